"""Whether an answer is correct: what a text gives as its answer, compared with the reference answer by math-verify.

`is_correct` takes whatever time it needs, so an evaluation calls it through `Grader`, in a process that can be killed.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, Float

from lt_train.evaluation.grading.extraction import ExtractedFrom, Kind, choice_letter, extract
from lt_train.evaluation.grading.inequalities import as_union
from lt_train.evaluation.grading.quantities import same_number
from lt_train.evaluation.grading.spelling import one_spelling

LONGEST_ANSWER = 10_000
"""Characters of an answer that are still looked into; a longer one is correct only where it is the reference answer verbatim."""

AS_BOXED_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]

FLOAT_DECIMALS, NUMERIC_DIGITS = 6, 15
"""math-verify's defaults: decimals to which it rounds, and digits in which it computes."""

LEAST_DIGITS = 3
"""Of the smallest number of a reference answer that a comparison looks at, whatever its size."""

WITH_BASE = re.compile(r"(?P<digits>[0-9A-Za-z]+)\s*_\s*(?:\{(?P<braced>[^{}]*(?:\{[^{}]*\})?)\}|(?P<digit>\d))")
OPTION = re.compile(r"\(?(?P<letter>[A-J])(?:\)|[.:](?=\s))\s*(?P<text>\S.*)", re.DOTALL)
TIME_OF_DAY = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?\s*(?P<half>[ap])\.?m\b\.?", re.IGNORECASE)
UNION = r"\cup"
IN_BRACES = re.compile(r"\\(?:left\\)?\{.*\\(?:right\\)?\}", re.DOTALL)
IN_PARENTHESES = re.compile(r"(?:\\left)?\(.*(?:\\right)?\)", re.DOTALL)


@dataclass(frozen=True)
class Grade:
    """`extracted` is None where there is no answer. `error` is the reason why an answer could not be judged; it then counts as
    incorrect.
    """

    extracted: str | None
    correct: bool
    error: str | None = None
    extracted_from: ExtractedFrom | None = None


def grade(text: str, reference: str, *, ended: bool = True) -> Grade:
    """Judge a generated text by the reference answer (LaTeX without its box, or plain text). Nothing limits the time that it takes:
    see `Grader`.

    Args:
        ended: False: the text was truncated.
    """
    extracted = extract(text, "math", ended)
    if extracted is None:
        return Grade(None, False)
    try:
        return Grade(extracted.answer, is_correct(reference, extracted.answer), None, extracted.extracted_from)
    except Exception as failure:
        return Grade(extracted.answer, False, describe(failure), extracted.extracted_from)


def is_correct(reference: str, extracted: str, kind: Kind = "math") -> bool:
    """Whether an extracted answer equals the reference answer. Nothing limits the time that it takes: see `Grader`.

    Raises:
        ValueError: the reference answer to a choice is no letter, or the extracted answer is too long to be judged.
        Exception: what math-verify raises on an answer that it cannot read.
    """
    if kind == "choice":
        letter = choice_letter(reference)
        if letter is None:
            raise ValueError(f"the reference answer to a multiple choice must be a letter from A to J, not {reference[:50]!r}")
        return choice_letter(extracted) == letter
    if len(extracted) > LONGEST_ANSWER and extracted.strip() != reference.strip():
        raise ValueError(f"the answer has {len(extracted):,} characters; more than {LONGEST_ANSWER:,} are not looked into")
    return matches(reference, extracted)


def matches(reference: str, answer: str) -> bool:
    """math-verify's verdict, after what can be seen without it; not symmetric where one side is an equation."""
    if reference.strip() == answer.strip():
        return True
    reference, answer = one_spelling(reference), one_spelling(answer)
    if any(as_union(each) or UNION in each for each in (reference, answer)):
        reference, answer = (as_union(each, commas=True) or each for each in (reference, answer))
    if reference == answer or same_number(reference, answer):
        return True
    if option := OPTION.fullmatch(answer):  # of a reference answer that is a letter, or the option's own text
        return reference == option["letter"] or matches(reference, option["text"])
    if (one := time_of_day(reference)) and (other := time_of_day(answer)):
        return one == other  # math-verify reads 11:00 as a division by zero
    if in_different_bases(reference, answer) or is_set_and_tuple(reference, answer):
        return False  # math-verify drops the base, and reads (1, 2) as an interval, which it takes for the set {1, 2}
    references, answers = read(reference), read(answer)
    if set(texts(references)) & set(texts(answers)):
        return True  # equal as text: spares the comparison, which may fail where the texts are equal all the same
    extra = extra_digits(references)
    return verify(
        references,
        answers,
        float_rounding=FLOAT_DECIMALS + extra,
        numeric_precision=NUMERIC_DIGITS + extra,
        allow_set_relation_comp=True,  # an interval equals its inequality, whichever of the two the reference answer is
        timeout_seconds=None,
        raise_on_error=True,
    )


def time_of_day(text: str) -> tuple[int, int, str] | None:
    """Hour, minute, and "a" or "p"; None: it is no time with am or pm."""
    found = TIME_OF_DAY.fullmatch(text)
    return (int(found["hour"]), int(found["minute"] or 0), found["half"].lower()) if found else None


def in_different_bases(first: str, second: str) -> bool:
    found = [WITH_BASE.fullmatch(answer.strip().strip("$").strip()) for answer in (first, second)]
    if found[0] is None or found[1] is None:
        return False
    bases = [re.sub(r"\\text|[{}\s]", "", each["braced"] or each["digit"]) for each in found if each]
    return bases[0] != bases[1]


def is_set_and_tuple(first: str, second: str) -> bool:
    return any(IN_BRACES.fullmatch(one) and IN_PARENTHESES.fullmatch(other) for one, other in ((first, second), (second, first)))


def extra_digits(readings: list[Any]) -> int:
    """Digits that a comparison needs besides math-verify's defaults, by which 2e-7 and 4e-7 are equal."""
    smallest = min((size for reading in readings if isinstance(reading, Basic) for size in sizes(reading)), default=1.0)
    return max(0, math.ceil(-math.log10(smallest)) + LEAST_DIGITS - FLOAT_DECIMALS)


def sizes(expression: Basic) -> list[float]:
    """Absolute values other than 0 of the numbers that an expression, or one of its elements, evaluates to."""
    parts = (expression, *expression.args, *expression.atoms(Float))
    values = [abs(part.evalf()) for part in parts if isinstance(part, Expr) and part.is_number]
    return [float(value) for value in values if value.is_Float and float(value) > 0]


@lru_cache(maxsize=4096)
def read(answer: str) -> list[Any]:
    """math-verify's readings of an answer: a sympy expression and the normalised text. The full stop of a sentence is dropped."""
    boxed = rf"\boxed{{{answer.rstrip(' .')}}}"
    return parse(boxed, AS_BOXED_LATEX, parsing_timeout=None, raise_on_error=True)


def texts(readings: list[Any]) -> list[str]:
    return [reading for reading in readings if isinstance(reading, str) and reading.strip()]


def describe(failure: BaseException) -> str:
    # Only the start of the message: math-verify puts the whole answer into it.
    return f"{type(failure).__name__}: {failure}"[:200]
