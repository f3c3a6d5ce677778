"""Numbers as text: percentages and ends of intervals."""

from lt_train.evaluation.statistics import Interval


def ends(span: Interval | None) -> tuple[float, ...]:
    return () if span is None else (span.low, span.high)


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"
