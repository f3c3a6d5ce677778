"""Numbers in words: shares, sizes, counts."""

from lt_train.evaluation.statistics import Interval


def ends(span: Interval | None) -> tuple[float, ...]:
    return () if span is None else (span.low, span.high)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"
