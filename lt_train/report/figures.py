"""Numbers in words: shares, sizes, counts; and the interval of a single score."""

import math
from statistics import NormalDist

from lt_train.evaluation.scores import LossScores, Scores
from lt_train.evaluation.statistics import CONFIDENCE, Interval, student_t


def interval(scores: Scores) -> Interval | None:
    """95 % interval of an accuracy in [0, 1] or of a loss; None where a single problem or sample tells nothing of the spread.

    Accuracy: the scores' own, a bootstrap over problems. Where all problems scored the same that has no width, so there it is
    Wilson's (1927), which keeps one: 30 of 30 right leaves room for 89 %. Loss: Student's t over samples.
    """
    if isinstance(scores, LossScores):
        if scores.standard_error is None:
            return None
        reach = student_t(scores.samples - 1) * scores.standard_error
        return Interval(scores.loss - reach, scores.loss + reach)
    if scores.interval is not None and scores.interval.low == scores.interval.high:
        return wilson(scores.accuracy, scores.problems)
    return scores.interval


def ends(span: Interval | None) -> tuple[float, ...]:
    return () if span is None else (span.low, span.high)


def wilson(share: float, n: int) -> Interval:
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def size(count: float) -> str:
    for unit, one in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 999.5 * one else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} B"


def kilo(tokens: float) -> str:
    """A number of tokens on an axis: 512, 4K, 1.5K (of 1,024)."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else f"{tokens:.0f}"
