"""Answers to real problems, and to multiple choice, are scored by the grader of their benchmark."""

from pathlib import Path

import pytest

from lt_train.benchmarks import BENCHMARKS, Problem, answer_tokens, load_problems
from lt_train.evaluation.grading.math_answers import Grade
from lt_train.evaluation.grading.scoring import AnswerScore, score_answer


@pytest.mark.parametrize(
    ("name", "file", "every"), [("aime24", "aime24.jsonl", 1), ("math500", "math500.jsonl", 10), ("gsm8k", "gsm8k_test.jsonl", 60)]
)
def test_the_true_answers_of_real_problems_are_correct_and_those_of_their_neighbours_incorrect(
    shared_data: Path, name: str, file: str, every: int
) -> None:
    benchmark = BENCHMARKS[name]
    problems = load_problems(benchmark, str(shared_data / file), None).problems[::every]
    for problem in problems:
        score = score_answer(benchmark, problem, rf"So the answer is \boxed{{{problem.answer}}}.")
        assert score.correct, problem
        assert score.extracted == problem.answer
    neighbours = list(zip(problems, problems[1:] + problems[:1], strict=True))
    wrong = [score_answer(benchmark, problem, rf"\boxed{{{other.answer}}}").score for problem, other in neighbours]
    assert sum(wrong) <= 0.1 * len(wrong)  # two neighbours may have the same answer


def test_mathematics_may_be_judged_elsewhere() -> None:
    judged = []

    def judge(text: str, reference: str, *, ended: bool) -> Grade:
        judged.append((text, reference, ended))
        return Grade("7", False, "took too long")

    score = score_answer(BENCHMARKS["custom"], Problem("0", "3 + 4?", ("7",)), "It is 7.", judge, ended=False)
    assert score == AnswerScore("7", 0.0, "took too long")
    assert judged == [("It is 7.", "7", False)]


@pytest.mark.parametrize(
    ("text", "extracted", "score"),
    [
        (r"<think>A?</think> It must be \boxed{C}.", "C", 1.0),
        (r"\boxed{\text{(C)}}", "C", 1.0),
        ("The correct answer is (C).", "C", 1.0),
        ("Answer: B", "B", 0.0),
        ("I cannot tell.", None, 0.0),
    ],
)
def test_multiple_choice_is_scored_by_its_letter(text: str, extracted: str | None, score: float) -> None:
    problem = Problem("rec1", "Which?", ("C",), classes=("A", "B", "C", "D"))
    found = score_answer(BENCHMARKS["gpqa_diamond"], problem, text)
    assert (found.extracted, found.score) == (extracted, score)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("aime24", None),
        ("gpqa_diamond", None),
        ("custom", None),
        ("longbench_qmsum", 512),
        ("longbench_trec", 64),
        ("needle", 64),
        ("passkey", 32),
        ("copying", 192),
    ],
)
def test_benchmarks_that_fix_how_long_an_answer_may_be_set_the_limit(name: str, tokens: int | None) -> None:
    assert answer_tokens(BENCHMARKS[name]) == tokens
    assert BENCHMARKS[name].truncated_is_incorrect == (tokens is None)
