"""Output of measurements: tables of right-aligned columns, and lines without highlighting."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def measurement_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_lines(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
