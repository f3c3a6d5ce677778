"""Progress of a long job: a bar with rate and time left on a terminal, elsewhere (a log file, SLURM) a line now and then.

On stderr, so that tables on stdout stay clean.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Made by `show_progress`. Time left follows from the rate since it was shown, so work done before does not count."""

    def __init__(self, description: str, done: int, total: int | None, shown: bool) -> None:
        console = Console(stderr=True)
        self._description = description
        self._done = self._done_before = done
        self._total = total
        self._started = time.perf_counter()
        self._last_line = self._started if shown and not console.is_terminal else None
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown or not console.is_terminal)
        self._task = self._progress.add_task(description, completed=done, total=total, rest="")

    @property
    def seconds(self) -> float:
        """Since the bar was shown."""
        return time.perf_counter() - self._started

    def update(self, done: int, details: str = "") -> None:
        """`done` of the total are done; `details` are shown beside it, such as a rate."""
        self._done = done
        rest = "  ".join(part for part in (details, self._left()) if part)
        self._progress.update(self._task, completed=done, rest=rest)
        now = time.perf_counter()
        if self._last_line is not None and (now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._total):
            self._last_line = now
            of_total = "" if self._total is None else f"/{self._total:,}"
            self._progress.console.print(f"{self._description} {done:,}{of_total}  {rest}", highlight=False, soft_wrap=True)

    def advance(self, details: str = "") -> None:
        self.update(self._done + 1, details)

    def _left(self) -> str:
        here = self._done - self._done_before
        if here <= 0 or self._total is None:
            return ""
        return f"{timedelta(seconds=round(self.seconds / here * (self._total - self._done)))} left"

    def start(self) -> None:
        self._started = time.perf_counter()
        self._progress.start()

    def stop(self) -> None:
        """Give the terminal back."""
        self._progress.stop()


@contextmanager
def show_progress(description: str, *, total: int | None = None, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """`total`: None where it is unknown."""
    bar = Bar(description, done, total, shown)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Hide transformers' bars, which it draws for every checkpoint: small ones need none, and ours would be broken by them."""
    from transformers.utils import logging  # heavy

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
