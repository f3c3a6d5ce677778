"""The score of an answer, by the grader that its benchmark names."""

import difflib
import re
import string
from dataclasses import dataclass
from typing import Protocol

from lt_train.benchmarks.declaration import Benchmark, Problem
from lt_train.benchmarks.longbench import FIRST_LINE_ONLY
from lt_train.evaluation.grading import longbench_metrics, math_answers
from lt_train.evaluation.grading.extraction import ExtractedFrom, end_of_reasoning, extract

METRICS = {
    "qa_f1": longbench_metrics.qa_f1,
    "qa_f1_zh": longbench_metrics.qa_f1_zh,
    "rouge": longbench_metrics.rouge,
    "rouge_zh": longbench_metrics.rouge_zh,
    "retrieval": longbench_metrics.retrieval,
    "count": longbench_metrics.count,
    "code_similarity": longbench_metrics.code_similarity,
}


class JudgeMath(Protocol):
    def __call__(self, text: str, reference: str, *, ended: bool) -> math_answers.Grade: ...


@dataclass(frozen=True)
class AnswerScore:
    """
    Attributes:
        extracted: what was scored; None: there is no answer.
        score: from 0 (incorrect) to 1 (correct).
        error: why it could not be judged; it then scores 0.
        extracted_from: how a short answer was found.
    """

    extracted: str | None
    score: float
    error: str | None = None
    extracted_from: ExtractedFrom | None = None

    @property
    def correct(self) -> bool:
        return self.score == 1.0


def score_answer(
    benchmark: Benchmark, problem: Problem, text: str, judge_math: JudgeMath = math_answers.grade, *, ended: bool = True
) -> AnswerScore:
    """Score a generated text, without the stop token at its end.

    Args:
        judge_math: judges answers to mathematics, which may need any amount of time.
        ended: False: the text was truncated.
    """
    if benchmark.grader == "math":
        grade = judge_math(text, problem.answer, ended=ended)
        return AnswerScore(grade.extracted, float(grade.correct), grade.error, grade.extracted_from)
    if benchmark.grader == "choice":
        return chosen_letter(problem, text)
    answer = text[end_of_reasoning(text) :]
    if benchmark.grader == "needle":
        return number_found(problem, answer)
    if benchmark.grader == "copying":
        return passage_copied(problem, answer)
    return longbench_score(benchmark, problem, answer)


def chosen_letter(problem: Problem, text: str) -> AnswerScore:
    found = extract(text, "choice")
    if found is None:
        return AnswerScore(None, 0.0)
    return AnswerScore(found.answer, float(found.answer == problem.answer), extracted_from=found.extracted_from)


def number_found(problem: Problem, answer: str) -> AnswerScore:
    """The first number with as many digits as the reference decides: a list of all numbers seen is no answer."""
    digits = len(problem.answer)
    found = re.search(rf"(?<!\d)\d{{{digits}}}(?!\d)", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    return AnswerScore(found[0], float(found[0] == problem.answer)) if found else AnswerScore(None, 0.0)


def passage_copied(problem: Problem, answer: str) -> AnswerScore:
    """The longest run of the passage's words in the answer, as a fraction of the passage. The passage has no
    punctuation, so punctuation around an answer's words does not count.
    """
    passage = problem.answer.split()
    words = [bare for word in answer.split() if (bare := word.strip(string.punctuation))]
    run = difflib.SequenceMatcher(None, passage, words, autojunk=False).find_longest_match()
    copied = " ".join(passage[run.a : run.a + run.size])
    return AnswerScore(copied or None, run.size / len(passage))


def longbench_score(benchmark: Benchmark, problem: Problem, answer: str) -> AnswerScore:
    """The best match with any of the reference answers (eval.py)."""
    if benchmark.name in FIRST_LINE_ONLY:
        answer = answer.lstrip("\n").split("\n")[0]
    if benchmark.grader == "classification":
        scores = [longbench_metrics.classification(answer, reference, problem.classes) for reference in problem.answers]
    else:
        scores = [METRICS[benchmark.grader](answer, reference) for reference in problem.answers]
    return AnswerScore(answer.strip() or None, max(scores))
