"""The progress line of an evaluation: samples done, tokens per second, time left. On stderr, so that tables on stdout
stay clean.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0
        self._started = time.perf_counter()

    def advance(self, tokens: int) -> None:
        """One more sample is done, with so many tokens."""
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._started)
        self._progress.update(self._task, advance=1, rate=f"{rate:,.0f} tokens/s")


@contextmanager
def show_bar(description: str, *, done: int, total: int, shown: bool) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield Bar(progress, progress.add_task(description, completed=done, total=total, rate=""))
