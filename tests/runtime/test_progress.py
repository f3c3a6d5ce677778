import io
import re

import pytest
from rich.console import Console

from lt_train.runtime import progress


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a log file gets instead of a terminal, with no wait between two lines."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=written))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    return written


def test_a_log_file_gets_whole_lines_with_figures_and_time_left(stderr: io.StringIO) -> None:
    with progress.show_progress("scoring", total=2000, done=500) as bar:
        for _ in range(2):
            bar.advance("7 tokens/s")
    first, second = stderr.getvalue().splitlines()
    assert re.fullmatch(r"scoring 501/2,000  7 tokens/s  \d+:\d\d:\d\d left", first)
    assert second.startswith("scoring 502/2,000")


def test_lines_keep_their_distance_but_the_last_one_always_comes(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 3600.0)
    with progress.show_progress("scoring", total=50) as bar:
        for _ in range(50):
            bar.advance()
    assert [line.split("  ")[0] for line in stderr.getvalue().splitlines()] == ["scoring 50/50"]


def test_time_left_follows_from_this_sessions_rate(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, *[100.0] * 9])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    bar = progress.Bar("training", done=90, total=100, shown=True)
    bar.start()
    bar.update(95)
    bar.stop()
    assert "training 95/100  0:01:40 left" in stderr.getvalue()  # 5 steps took 100 s, 5 are left


def test_nothing_is_shown_where_nobody_requested_it(stderr: io.StringIO) -> None:
    with progress.show_progress("scoring", total=1, shown=False) as bar:
        bar.advance()
    assert stderr.getvalue() == ""
