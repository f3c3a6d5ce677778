"""Numbers in words: shares, sizes, counts."""

from lt_train.evaluation.statistics import Interval


def ends(span: Interval | None) -> tuple[float, ...]:
    return () if span is None else (span.low, span.high)


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
