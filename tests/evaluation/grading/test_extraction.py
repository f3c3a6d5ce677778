import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation.grading.extraction import Extracted, extract, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("the answer is 3.14. I hope it is correct.", "3.14"),
        ("So the answer is: $5$ dollars.", "5"),
        ("the answer is $5.", "$5"),
        (r"the answer is \$5.", r"\$5"),
        ("The final answer is **7**.", "7"),
        ("**Final Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("#### Answer: 5", "5"),
        ("Final answer:\n\n$\\frac{1}{2}$", r"\frac{1}{2}"),
        (r"the answer is \(x = 5\).", "x = 5"),
        ("the answer is 1,234", "1,234"),
        ("the answers are 5, 6", "5, 6"),
        ("The answer to the question is 5, because 2 + 3 = 5.", "5"),
        ("the answer is 12 cm since it grows", "12 cm"),
        ("The answer is 5? No, the answer is 6.", "6"),
        ("答案是 42\u3002", "42"),
        ("因此\uff0c最终答案\uff1a12 cm\u3002因为", "12 cm"),
        ("答案:5", "5"),
        ("したがって\u3001答えは42です", "42"),
        ("最終的な答えは $\\frac{1}{2}$ となります\u3002", r"\frac{1}{2}"),
        ("the answer is not 5", None),
        (r"the answer is \boxed{\frac{1}{", None),
        ("I answered", None),
        ("There are some of them.", None),
        ("the answer is", None),
        ("", None),
        ("the answer is 5\n" + "a line that adds nothing to it\n" * 100, None),
        ("<think>the answer is 5, or is it? </think> It cannot be known.", None),
        ("<think>the answer is 5</think>the answer is 6", "6"),
    ],
)
def test_without_a_box_the_last_phrase_at_the_end_names_the_answer(text: str, answer: str | None) -> None:
    assert extract(text) == (None if answer is None else Extracted(answer, "phrase"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("Thus, it takes 3 bolts in total. #### 3", "3"),
        ("### Final Answer\n18", "18"),
        ("## Final Answer\n\nThe total is 18 dollars.", "18"),
        ("**Final Answer**\n\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
        ("### Final Answer\nThe largest number divisible by 12 and 18 is:\n\n\\[\n9900\n\\]", "9900"),
        ("Q: How many?\nA: 33", "33"),
        ("Q: How many?\nA: She has 33 apples.", "33"),
        ("<answer>33</answer>", "33"),
        ("<answer>\n$x = 3$\n</answer>", "x = 3"),
        ("<answer>Evelyn</answer>", "Evelyn"),
        ("The answer is $\\$18.90$.", r"\$18.90"),
        ("The final answer is\n$$\n5\n$$", "5"),
        ("#### 1. Sum up\n#### Answer: 5", "5"),
    ],
)
def test_marks_of_an_answer_name_it(text: str, answer: str) -> None:
    assert extract(text) == Extracted(answer, "phrase")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("There are 5 of them.", "5"),
        ("So it is **33**.", "33"),
        ("So it is **33 apples** in total, which is all", "33"),
        ("So it is **p - q**.", "p - q"),
        (r"It costs **\$18.90**.", "18.90"),
        ("Thus $x = 7$.", "x = 7"),
        ("So\n\\[\nx=\\frac{3}{38}\n\\]\n\nI hope this helps!", r"x=\frac{3}{38}"),
        ("There are 4 of one kind and 3 of the other.\n\nThus 1,234 people.", "1234"),
        ("<think>7, or 8?</think>It is 3/4 of the cake.", "3/4"),
        ("#### 1. Add 3 and 4\nWe get 7", "7"),
    ],
)
def test_where_nothing_names_the_answer_the_last_formula_or_number_is_taken_and_marked(text: str, answer: str) -> None:
    assert extract(text) == Extracted(answer, "last")
    assert extract(text, ended=False) is None


@pytest.mark.parametrize("text", ["<think>so it is 5", "<|begin_of_thought|>\n\n$5$", "<think>5</think>It cannot be known."])
def test_the_last_number_of_a_line_of_reasoning_is_no_answer(text: str) -> None:
    assert extract(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{5}</think>The answer is 6.", Extracted("6", "phrase")),
        (r"<think>\boxed{5}</think>So $x = 6$.", Extracted("x = 6", "last")),
        (r"<|begin_of_thought|>\boxed{5}<|end_of_thought|>\boxed{6}<|end_of_solution|>", Extracted("6", "boxed")),
        (r"<think>\boxed{5}</think>That was all.", Extracted("5", "boxed")),
        (r"<think>\boxed{5}</think>", Extracted("5", "boxed")),
        (r"<think>\boxed{5}", Extracted("5", "boxed")),
    ],
)
def test_what_follows_the_reasoning_counts_before_a_box_in_it(text: str, answer: Extracted) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{5} The answer is 6.", r"The answer is 6. \boxed{5}", r"the answer is \boxed{5}"])
def test_a_box_counts_before_any_phrase(text: str) -> None:
    assert extract(text) == Extracted("5", "boxed")


@pytest.mark.parametrize("text", [r"\boxed{} the answer is 6", r"\boxed{\frac{1}{ the answer is 6"])
def test_a_box_that_is_empty_or_open_leaves_the_phrase(text: str) -> None:
    assert extract(text) == Extracted("6", "phrase")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{\mathrm{b}}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{B) 12 cm}", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        (r"\boxed{B. \text{ Evelyn}}", "B"),
        (r"\boxed{42}", "42"),
        (r"\boxed{\text{A and B}}", r"\text{A and B}"),
        (r"\boxed{\text{Bob}}", r"\text{Bob}"),
    ],
)
def test_the_letter_in_a_box_is_the_choice(text: str, letter: str) -> None:
    assert extract(text, "choice") == Extracted(letter, "boxed")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("It follows.\n\nC.", "C"),
        ("Answer: B", "B"),
        ("Answer: $B$", "B"),
        ("Answer: **D**", "D"),
        ("Answer (C)", "C"),
        ("The answer is (B).", "B"),
        ("the answer is A", "A"),
        (r"the answer is $\text{B}$", "B"),
        ("The answer is option (D): 5", "D"),
        ("The answer is **B) 12 cm**", "B"),
        ("The final answer is (A) 5 cm", "A"),
        ("The correct answer is B because it floats", "B"),
        ("the correct option is C", "C"),
        ("I choose option C.", "C"),
        ("Option A is wrong. The answer is C. Option B is not right.", "C"),
        ("Option C is right, for option A is not.", "C"),
        ("Therefore option A is correct.", "A"),
        ("The answer is A because it floats", "A"),
        ("The answer is I since it floats", "I"),
        ("Option A is correct. Option B is incorrect.", "A"),
        (r"<think>\boxed{B}</think>The answer is A.", "A"),
        ("Option C fits. Option B is incorrect.", "C"),
        ("The answer is C. Option B came close.", "C"),
        ("答案是 B", "B"),
        ("正确答案是(C)\u3002", "C"),
        ("答案选C", "C"),
        ("故选D\u3002", "D"),
        ("故选项D", "D"),
        ("the answer is A and B", None),
        ("the answer is a cat", None),
        ("The answer is A cat", None),
        ("The answer is I think unknown", None),
        ("I do not know.", None),
        ("A thing happened", None),
        ("", None),
    ],
)
def test_without_a_box_a_phrase_or_the_last_line_names_the_choice(text: str, letter: str | None) -> None:
    assert extract(text, "choice") == (None if letter is None else Extracted(letter, "phrase"))


@given(st.text(alphabet="\\boxed{}answeri: ()$*AB5.\n选项答案是", max_size=300))
def test_any_text_gives_a_stripped_answer_or_none(text: str) -> None:
    for kind in ("math", "choice"):
        found = extract(text, kind)
        assert found is None or (found.answer and found.answer == found.answer.strip())
        assert (found is not None and found.extracted_from == "boxed") == (last_boxed(text) is not None)


@pytest.mark.parametrize(
    "part",
    ["answer ", "the answer is ", "the answer to ", "答案", r"\boxed{", "$", "(", "option A ", " ", "*", "{", r"\(", "answer is"],
)
def test_no_text_takes_long(part: str) -> None:
    started = time.process_time()
    for kind in ("math", "choice"):
        extract(part * (200_000 // len(part)), kind)
    assert time.process_time() - started < 1
