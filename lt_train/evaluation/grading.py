r"""Is the answer right: the last balanced `\boxed{}` of a text, held against the true answer by math-verify.

No box, or an empty one, is no answer. Whatever math-verify cannot do in its time (an answer that is a tower of powers,
five hundred braces) is a wrong answer with the reason in the record, never an end of the run.
"""

import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

SECONDS = 5
"""Time limit for reading an answer, and again for comparing two. Real answers take milliseconds."""

BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
r"""Whatever matters for balance. `\\.` consumes escaped characters, so that `\{` and `\}` do not count."""

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
        return Grade(extracted, matches(answer, extracted))
    except FAILURES as failure:
        return Grade(extracted, False, describe(failure))


def equivalent(first: str, second: str) -> bool:
    """Whether two extracted answers say the same; False where math-verify fails on one of them."""
    require_main_thread()
    try:
        return matches(first, second)
    except FAILURES:
        return False


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` whose braces balance, stripped; None where there is none, or nothing in it.

    Of nested boxes the outer one counts. One pass over the text, whatever it holds.
    """
    opened: list[int | None] = []  # for each open brace: where its content starts if it opens a box
    content: str | None = None
    for token in BRACES.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None:
                content = text[start : token.start()]
    return (content or "").strip() or None


def matches(gold: str, answer: str) -> bool:
    """math-verify's verdict; not symmetric where one side is an equation."""
    gold_readings, answer_readings = read(gold), read(answer)
    if set(texts(gold_readings)) & set(texts(answer_readings)):
        return True  # equal as text: spares the comparison, which may fail where the texts are equal all the same
    return verify(gold_readings, answer_readings, timeout_seconds=SECONDS, raise_on_error=True)


@lru_cache(maxsize=4096)
def read(answer: str) -> list[Any]:
    """math-verify's readings of an answer: a sympy expression and the normalised text. The full stop of a sentence is
    dropped.
    """
    boxed = rf"\boxed{{{answer.rstrip(' .')}}}"
    return parse(boxed, AS_BOXED_LATEX, parsing_timeout=SECONDS, raise_on_error=True)


def texts(readings: list[Any]) -> list[str]:
    return [reading for reading in readings if isinstance(reading, str) and reading.strip()]


def describe(failure: BaseException) -> str:
    # Only the start of the message: math-verify puts the whole answer into it.
    return f"{type(failure).__name__}: {failure}"[:200]


def require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("grading works in the main thread only: math-verify limits its time by SIGALRM")
