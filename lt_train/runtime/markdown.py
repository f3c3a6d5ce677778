"""Tables as Markdown, for trackers that show text alone."""

from collections.abc import Sequence
from typing import Any


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    """A cell's text; None is empty, and characters that would end a cell or a line are replaced."""
    return "" if value is None else " ".join(str(value).replace("|", "&#124;").split())
