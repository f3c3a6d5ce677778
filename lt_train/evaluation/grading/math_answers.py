r"""Is an answer right: what a text gives as its answer, held against the true answer by math-verify.

`is_correct` takes whatever time it needs, so an evaluation calls it through `Grader`, in a process that can be killed. `grade` and
`equivalent` judge boxed answers in this process, as far as an alarm in the main thread can limit their time.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from lt_train.evaluation.grading.extraction import ExtractedFrom, Kind, choice_letter, last_boxed
from lt_train.evaluation.grading.quantities import same_number

SECONDS = 5
"""Time limit for reading an answer, and again for comparing two. Real answers take milliseconds."""

LONGEST_ANSWER = 10_000
"""Characters of an answer that are still looked into; a longer one is right only where it is the true answer letter by letter."""

AS_BOXED_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]

FAILURES = (Exception, TimeoutException)
"""What math-verify may raise. Its TimeoutException is a BaseException, which `except Exception` lets through."""


@dataclass(frozen=True)
class Grade:
    """`extracted` is None where there is no answer. `error` says why an answer could not be judged; it then counts as
    wrong.
    """

    extracted: str | None
    correct: bool
    error: str | None = None
    extracted_from: ExtractedFrom | None = None


def grade(text: str, answer: str) -> Grade:
    """Judge a generated text by the true answer (LaTeX without its box, or plain text).

    Raises:
        RuntimeError: called outside the main thread, where math-verify's time limit (SIGALRM) cannot work.
    """
    require_main_thread()
    extracted = last_boxed(text)
    if extracted is None:
        return Grade(None, False)
    try:
        return Grade(extracted, matches(answer, extracted, SECONDS), extracted_from="boxed")
    except FAILURES as failure:
        return Grade(extracted, False, describe(failure), "boxed")


def equivalent(first: str, second: str) -> bool:
    """Whether two extracted answers say the same; False where math-verify fails on one of them."""
    require_main_thread()
    try:
        return matches(first, second, SECONDS)
    except FAILURES:
        return False


def is_correct(answer: str, extracted: str, kind: Kind = "math") -> bool:
    """Whether an extracted answer says the same as the true one. Nothing limits the time that it takes: see `Grader`.

    Raises:
        ValueError: the true answer to a choice is no letter, or the extracted answer is too long to be judged.
        Exception: what math-verify raises on an answer that it cannot read.
    """
    if kind == "choice":
        letter = choice_letter(answer)
        if letter is None:
            raise ValueError(f"the true answer to a multiple choice must be a letter from A to J, not {answer[:50]!r}")
        return choice_letter(extracted) == letter
    if len(extracted) > LONGEST_ANSWER and extracted.strip() != answer.strip():
        raise ValueError(f"the answer has {len(extracted):,} characters; more than {LONGEST_ANSWER:,} are not looked into")
    return matches(answer, extracted, seconds=None)


def matches(gold: str, answer: str, seconds: int | None) -> bool:
    """math-verify's verdict, after what can be seen without it; not symmetric where one side is an equation."""
    if gold.strip() == answer.strip() or same_number(gold, answer):
        return True
    gold_readings, answer_readings = read(gold, seconds), read(answer, seconds)
    if set(texts(gold_readings)) & set(texts(answer_readings)):
        return True  # equal as text: spares the comparison, which may fail where the texts are equal all the same
    return verify(gold_readings, answer_readings, timeout_seconds=seconds, raise_on_error=True)


@lru_cache(maxsize=4096)
def read(answer: str, seconds: int | None) -> list[Any]:
    """math-verify's readings of an answer: a sympy expression and the normalised text. The full stop of a sentence is
    dropped.
    """
    boxed = rf"\boxed{{{answer.rstrip(' .')}}}"
    return parse(boxed, AS_BOXED_LATEX, parsing_timeout=seconds, raise_on_error=True)


def texts(readings: list[Any]) -> list[str]:
    return [reading for reading in readings if isinstance(reading, str) and reading.strip()]


def describe(failure: BaseException) -> str:
    # Only the start of the message: math-verify puts the whole answer into it.
    return f"{type(failure).__name__}: {failure}"[:200]


def require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("grading works in the main thread only: math-verify limits its time by SIGALRM")
