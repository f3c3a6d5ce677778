import gc
import threading
from pathlib import Path

import pytest

from lt_train.benchmarks import BENCHMARKS, load_problems
from lt_train.evaluation.grading import math_answers as grading
from lt_train.evaluation.grading.math_answers import equivalent, grade, last_boxed

REAL_FILES = [("aime24", "aime24.jsonl"), ("math500", "math500.jsonl"), ("gsm8k", "gsm8k_test.jsonl")]


def gold_answers(shared_data: Path, name: str, file: str) -> list[str]:
    return [problem.answer for problem in load_problems(BENCHMARKS[name], str(shared_data / file), None).problems]


@pytest.mark.parametrize(("name", "file"), REAL_FILES)
def test_every_true_answer_of_the_real_files_is_right_in_a_box(shared_data: Path, name: str, file: str) -> None:
    answers = gold_answers(shared_data, name, file)
    wrong = [answer for answer in answers if not grade(f"So the answer is $\\boxed{{{answer}}}$.", answer).correct]
    assert wrong == []


@pytest.mark.parametrize(("name", "file"), REAL_FILES)
def test_a_wrong_answer_to_a_real_problem_is_wrong(shared_data: Path, name: str, file: str) -> None:
    answers = gold_answers(shared_data, name, file)[:200]
    right = [answer for answer in answers if grade(r"\boxed{-98765.4321}", answer).correct]
    assert right == []


def test_whole_numbers_are_right_in_other_spellings(shared_data: Path) -> None:
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
        (r"\fbox{5} \box{6}", None),
        ("\\boxed{1 +\n2}", "1 +\n2"),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, extracted: str | None) -> None:
    assert last_boxed(text) == extracted


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
def test_equal_answers_are_right_and_others_wrong(answer: str, given: str, correct: bool) -> None:
    assert grade(rf"\boxed{{{given}}}", answer).correct is correct


def test_no_answer_is_wrong_and_said_to_be_none() -> None:
    assert grade("I do not know.", "5") == grading.Grade(extracted=None, correct=False, error=None)


@pytest.mark.parametrize("answer", [r"10^{10^{10}}", "{" * 400 + "5" + "}" * 400, r"100000000!"])
def test_an_answer_the_grader_cannot_judge_is_wrong_with_the_reason(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(grading, "SECONDS", 1)
    gc.disable()  # hypothesis hooks it, and Python drops an exception that a signal raises inside such a hook
    try:
        verdict = grade(rf"\boxed{{{answer}}}", "5")
    finally:
        gc.enable()
    assert not verdict.correct
    assert verdict.extracted == answer
    assert "Timeout" in verdict.error
    assert len(verdict.error) <= 200


def test_a_hundred_thousand_open_boxes_take_no_time() -> None:
    assert last_boxed(r"\boxed{" * 100_000 + "5}") == "5"


def test_equivalent_answers_are_seen_as_one() -> None:
    assert equivalent("0.5", r"\frac12")
    assert not equivalent("0.5", "0.6")
    assert not equivalent("0.5", r"\frac{")


def test_grading_outside_the_main_thread_is_refused_because_its_time_limit_would_not_work() -> None:
    raised = []

    def call() -> None:
        try:
            grade(r"\boxed{5}", "5")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert raised and "main thread" in raised[0]
