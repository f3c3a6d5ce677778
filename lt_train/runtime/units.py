"""Bytes, durations and lengths as people read them: three significant digits and a unit."""

MIB, GIB = 2**20, 2**30

_BYTES = (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", 2**10))
_SECONDS = (("days", 86_400), ("hours", 3_600), ("minutes", 60))


def format_bytes(count: float) -> str:
    """7.63 GiB, 1,020 MiB, 512 B."""
    unit, size = byte_unit(count)
    return f"{count:.0f} B" if size == 1 else f"{_three_digits(count / size)} {unit}"


def byte_unit(count: float) -> tuple[str, int]:
    """The largest unit of which `count` is at least one, and its bytes."""
    return next(((unit, size) for unit, size in _BYTES if count >= size), ("B", 1))


def format_duration(seconds: float) -> str:
    """2.5 hours, 12 minutes, 0.35 seconds."""
    for unit, length in _SECONDS:
        if seconds >= 2 * length:
            return f"{_three_digits(seconds / length)} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def format_tokens(tokens: float) -> str:
    """A number of tokens where there is little room: 512, 4K, 1.5K (of 1,024)."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else f"{tokens:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
