import json
from pathlib import Path

import pytest

from lt_train.benchmarks import BENCHMARKS, load_problems
from lt_train.evaluation.grading.extraction import balanced_boxes, last_boxed
from lt_train.evaluation.grading.math_answers import Grade, grade, is_correct

REAL_FILES = [("aime24", "aime24.jsonl"), ("math500", "math500.jsonl"), ("gsm8k", "gsm8k_test.jsonl")]


def gold_answers(shared_data: Path, name: str, file: str) -> list[str]:
    return [problem.answer for problem in load_problems(BENCHMARKS[name], str(shared_data / file), None).problems]


@pytest.mark.parametrize(("name", "file"), REAL_FILES)
def test_every_true_answer_of_the_real_files_is_correct_in_a_box(shared_data: Path, name: str, file: str) -> None:
    answers = gold_answers(shared_data, name, file)
    incorrect = [answer for answer in answers if not grade(f"So the answer is $\\boxed{{{answer}}}$.", answer).correct]
    assert incorrect == []


@pytest.mark.parametrize(("name", "file"), REAL_FILES)
def test_an_incorrect_answer_to_a_real_problem_is_incorrect(shared_data: Path, name: str, file: str) -> None:
    answers = gold_answers(shared_data, name, file)[:60]
    correct = [answer for answer in answers if grade(r"\boxed{-98765.4321}", answer).correct]
    assert correct == []


def test_whole_numbers_are_correct_in_other_spellings(shared_data: Path) -> None:
    for answer in gold_answers(shared_data, "gsm8k", "gsm8k_test.jsonl")[:100]:
        number = int(answer.replace(",", ""))
        for spelling in (f"{number:,}", f"{number}.0", rf"\${number}", rf"{number} \text{{ dollars}}", f"{number}."):
            assert grade(rf"\boxed{{{spelling}}}", answer).correct, spelling
        assert not grade(rf"\boxed{{{number + 1}}}", answer).correct


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        (r"no box at all, the answer is 5", None),
        (r"\boxed{}", None),
        (r"\boxed{   }", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"first \boxed{1}, no: \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2}", r"\{1, 2"),
        (r"\boxed{\left\{ x \right\}}", r"\left\{ x \right\}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"good \boxed{3}, then cut off: \boxed{\frac{1}{", "3"),
        (r"\boxed{ open, yet \boxed{4} inside", "4"),
        (r"} stray { braces \boxed{8} }", "8"),
        (r"\boxed{5} and after it \boxed{}", None),
        (r"\fbox{5} \box{6}", "5"),
        (r"\fbox{204}", "204"),
        (r"\boxed 204", "204"),
        (r"so $\boxed 204$.", "204"),
        (r"\boxed{1}, then \fbox{\boxed{2}}", r"\boxed{2}"),
        ("\\boxed{1 +\n2}", "1 +\n2"),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, extracted: str | None) -> None:
    assert last_boxed(text) == extracted


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        (r"\boxed{-2} and \boxed{1}", "-2, 1"),
        (r"so $\boxed{-2}$ or $\boxed{1}$.", "-2, 1"),
        (r"$x=\boxed{-2}$ and $x=\boxed{1}$", "-2, 1"),
        (r"\boxed{6}, \boxed{7}, \boxed{8}, and \boxed{9}", "6, 7, 8, 9"),
        (r"\[\boxed{6}\text{ and }\boxed{7}\]", "6, 7"),
        (r"\boxed{5} and \boxed{5}", "5"),
        (r"first \boxed{1}, no: \boxed{2} and \boxed{3}.", "2, 3"),
        (r"\boxed{1} is too small, and \boxed{2} it is", "2"),
        (r"\boxed{1} \boxed{2}", "2"),
    ],
)
def test_boxes_that_and_or_or_a_comma_joins_are_one_answer(text: str, extracted: str) -> None:
    assert last_boxed(text) == extracted


def test_joined_boxes_are_correct_where_the_reference_lists_them() -> None:
    assert grade(r"$\boxed{-2}$ and $\boxed{1}$", "-2, 1").correct
    assert grade(r"$\boxed{1}$ and $\boxed{-2}$", "-2, 1").correct
    assert not grade(r"$\boxed{-2}$ and $\boxed{2}$", "-2, 1").correct


@pytest.mark.parametrize(
    ("answer", "given", "correct"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"50\%", "50", True),
        (r"50\%", "51", False),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"\text{Evelyn}", r"\text{Angela}", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi)", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("x + 1", "1 + x", True),
        ("033", "33", True),
        (r"90^\circ", "90", True),
        ("5", "x = 5", True),
        ("5", r"\frac{", False),
        ("5", r"\{1, 2", False),
    ],
)
def test_equal_answers_are_correct_and_others_incorrect(answer: str, given: str, correct: bool) -> None:
    assert grade(rf"\boxed{{{given}}}", answer).correct is correct


def test_no_answer_is_incorrect_and_reported_as_none() -> None:
    assert grade("I do not know.", "5") == Grade(extracted=None, correct=False, error=None)


def test_a_hundred_thousand_open_boxes_take_no_time() -> None:
    assert last_boxed(r"\boxed{" * 100_000 + "5}") == "5"


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1234567", "1 234 567"),
        ("1234567", "1\u2009234\u2009567"),  # thin spaces
        ("1234567", "1\u00a0234\u00a0567"),  # hard spaces
        ("1234567", "1\u202f234\u202f567"),
        ("12345.5", "12 345.5"),
        ("-5", "\uff0d5"),  # full-width minus
        ("x-5", "x\uff0d5"),
        (r"\emptyset", r"\varnothing"),
        ("34", r"\approx 34"),
        ("34", "\u2248 34"),
        ("0.5", "0{,}5"),
        ("0.125", "0{,}125"),
        ("1234", "1{,}234"),
        (r"\frac{1+\sqrt{5}}{2}, \frac{1-\sqrt{5}}{2}", r"\frac{1 \pm \sqrt{5}}{2}"),
        (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1-\sqrt{5}}{2}, \frac{1+\sqrt{5}}{2}"),
        (r"\sqrt{2+\sqrt{3}}, \sqrt{2-\sqrt{3}}", r"\sqrt{2\pm\sqrt{3}}"),
        ("1, 3", r"2 \pm 1"),
        ("0, 2, -2", r"0, \pm 2"),
        (r"\{1, 3\}", r"\{2 \pm 1\}"),
        ("18.90", r"$\$18.90$"),
        (r"1.5\times 10^{-7}", "1.5e-7"),
        (r"1.5\times 10^{-7}", "0.00000015"),
        (r"\sqrt{2}", "\u221a2"),
        ("1010_2", "1010_{2}"),
        (r"\frac{1}{3}", "0.333333"),
        ("(1,2)", "(1, 2)"),
        (r"\{1,2\}", "2, 1"),
        ("June 20", r"\text{June 20}"),
        ("3/2", "1 1/2"),
        ("1 1/2", "1.5"),
        ("-5/2", "-2 1/2"),
        (r"(2,\infty)", "x>2"),
        ("x>2", r"(2,\infty)"),
        ("[1,3)", r"1 \le x < 3"),
        ("11:00 am", "11:00 a.m."),
        ("11 PM", "11:00 pm"),
        ("A", "A) 5"),
        ("5", "(A) 5"),
        ("12 cm", "B. 12 cm"),
    ],
)
def test_the_same_answer_in_another_spelling_is_correct(reference: str, answer: str) -> None:
    assert is_correct(reference, answer)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1010_3", "1010_2"),
        ("1010_{3}", "1010_{2}"),
        (r"1010_{\text{three}}", r"1010_{\text{two}}"),
        ("(1,2)", r"\{1,2\}"),
        (r"\left(1,2\right)", r"\left\{1,2\right\}"),
        ("0.0000002", "0.0000004"),
        ("2e-7", "4e-7"),
        (r"2\times 10^{-20}", r"10^{-20}"),
        (r"\frac{1}{10^{20}}", r"\frac{2}{10^{20}}"),
        ("(0.0000002, 1)", "(0.0000004, 1)"),
        (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1 + \sqrt{5}}{2}"),
        ("3", r"2 \pm 1"),
        ("1, 234", "1234"),
        ("1 2", "12"),
        ("125", "0{,}125"),
        ("125", "0,125"),
        ("34", r"\approx 35"),
        ("18.90", r"$\$18.91$"),
        ("-5", "\uff0d6"),
        ("3/2", "1 1/3"),
        (r"(2,\infty)", r"x \ge 2"),
        ("11:00 am", "11:00 pm"),
        ("11:00 am", "11:30 am"),
        ("A", "B) 5"),
        ("6", "(A) 5"),
    ],
)
def test_answers_that_look_alike_are_incorrect_both_ways(first: str, second: str) -> None:
    assert not is_correct(first, second)
    assert not is_correct(second, first)


def test_gsm8ks_reference_solutions_are_all_correct(shared_data: Path) -> None:
    problems = load_problems(BENCHMARKS["gsm8k"], str(shared_data / "gsm8k_test.jsonl"), None).problems
    with open(shared_data / "gsm8k_test.jsonl", encoding="utf-8") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    verdicts = [grade(solution, problem.answer) for solution, problem in zip(solutions, problems, strict=True)]
    assert len(verdicts) == 1319 and all(verdict.correct for verdict in verdicts)
    assert {verdict.extracted_from for verdict in verdicts} == {"phrase"}


@pytest.mark.parametrize(
    "template",
    [
        "Thus, the value is $ANSWER$.",
        "We get\n\\[\nANSWER\n\\]\n\nI hope this helps!",
        "### Final Answer\nANSWER",
        "**Final Answer**\n\nThe value that we look for is:\n\n\\[\nANSWER\n\\]",
        "<answer>ANSWER</answer>",
        "#### ANSWER",
        "A: ANSWER",
        "So it equals **ANSWER**.",
        "\\fbox{ANSWER}",
    ],
)
def test_the_true_answers_of_math500_are_found_without_a_box_and_no_others(shared_data: Path, template: str) -> None:
    """Every tenth problem; each solution computes something else first, and is held against the next problem's answer, too."""
    answers = gold_answers(shared_data, "math500", "math500.jsonl")[::10]
    texts = [f"<think>\\boxed{{7}}?</think>We need $x + 7 = 3$.\n\n{template.replace('ANSWER', answer)}" for answer in answers]
    missed = [answer for text, answer in zip(texts, answers, strict=True) if not grade(text, answer).correct]
    assert missed == []
    others = answers[1:] + answers[:1]
    taken = [
        (text, other)
        for text, other, own in zip(texts, others, answers, strict=True)
        if other != own and grade(text, other).correct
    ]
    assert taken == []


def test_real_solutions_whose_boxes_were_taken_off_give_their_answer(shared_data: Path) -> None:
    """Of 110 solutions with a box among STILL's traces. What is missed are words, and lists whose box held a part only."""
    solutions = [text for text in still_solutions(shared_data) if last_boxed(text)]
    answers = [last_boxed(text) or "" for text in solutions]
    verdicts = [grade(without_boxes(text), answer) for text, answer in zip(solutions, answers, strict=True)]
    assert len(solutions) == 110
    assert sum(verdict.extracted is None for verdict in verdicts) == 0
    assert sum(verdict.correct for verdict in verdicts) >= 105


def still_solutions(shared_data: Path) -> list[str]:
    with open(shared_data / "reasoning_traces_still.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["combined_text"].rpartition("<|end_of_thought|>")[2] for line in file]


def without_boxes(text: str) -> str:
    while boxes := balanced_boxes(text):
        start, content, end = boxes[-1]
        text = text[:start] + text[content:end] + text[end + 1 :]
    return text


UNION = r"(-\infty, 1] \cup [3, \infty)"


@pytest.mark.parametrize(
    "answer",
    [
        r"x \le 1 \text{ or } x \ge 3",
        r"x\ge3\quad\text{or}\quad x\leqslant1",
        "x ≤ 1 or x ≥ 3",
        r"1 \geq x \lor x \geq 3",
        r"x \le 1, x \ge 3",
        r"\{x \in \mathbb{R} \mid x \le 1 \text{ or } x \ge 3\}",
        r"(-\infty, 1] \text{ or } [3, \infty)",
    ],
)
def test_inequalities_joined_by_or_are_the_union_of_their_intervals(answer: str) -> None:
    for reference in (UNION, r"\left(-\infty, 1\right] \cup \left[3, \infty\right)", r"x \le 1 \text{ or } x \ge 3"):
        assert is_correct(reference, answer)
    assert is_correct(r"(1, \frac{5}{2}] \cup \{4\}", r"1 < x \le \frac{5}{2} \text{ or } x = 4")


@pytest.mark.parametrize(
    "answer",
    [
        r"x \le 1 \text{ or } x \ge 4",
        r"x < 1 \text{ or } x \ge 3",
        r"x \ge 1 \text{ or } x \le 3",
        r"x \le 1 \text{ and } x \ge 3",
        r"x \le 1 \text{ or } y \ge 3",
        r"x \le 1",
        r"1 \le x \le 3",
    ],
)
def test_other_inequalities_are_not(answer: str) -> None:
    for reference in (UNION, r"x \le 1 \text{ or } x \ge 3"):
        assert not is_correct(reference, answer)


def test_solutions_joined_by_or_stay_a_list() -> None:
    assert is_correct("2, 3", r"x = 2 \text{ or } x = 3") and is_correct(r"x = 2 \text{ or } x = 3", "3, 2")
    assert not is_correct("x > 0, x < 3", "x > 1, x < 3"), "a comma may stand for and"
