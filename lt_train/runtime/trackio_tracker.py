"""The curves, pictures and scores of a run in trackio's database on this machine. `trackio show` shows them.

A run keeps one name over all its resumes; tracking.jsonl has it. A resume reads from the database which points it holds.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lt_train.runtime.errors import UserError
from lt_train.runtime.files import append_json_line, drop_cut_line, read_json_lines
from lt_train.runtime.wandb_tracker import STATE_FILE

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables with which trackio writes to another machine, whose points a resume cannot read."""


class TrackioTracker:
    def __init__(self, project: str, run_folder: Path, config: dict[str, Any]) -> None:
        import trackio

        for variable in ELSEWHERE:
            if variable in os.environ:
                raise UserError(
                    f"track.trackio: {variable}: a run that resumes reads the database of this machine. "
                    "Fix: unset it; `trackio sync` uploads a project afterwards"
                )
        self._trackio, self._project, self._name = trackio, project, _run_name(run_folder)
        self._points: set[tuple[str, int]] = set()
        self._tables: dict[str, tuple[int, Any]] = {}  # the last rows of each name, and its step
        self._read()
        with _quiet():
            try:
                self._run = trackio.init(
                    project,
                    self._name,
                    config=config,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
            except (OSError, ValueError) as error:
                raise UserError(f"track.trackio: trackio cannot start: {error}. Fix: correct that, or set it to false") from error

    def log(self, metrics: dict[str, Any], step: int) -> None:
        new = {name: value for name, value in metrics.items() if (name, step) not in self._points}
        if new:
            self._points.update((name, step) for name in new)
            self._run.log(new, step=step)

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        self.log({f"{group}/{name}": value for name, value in metrics.items()}, step)  # here steps need not grow

    def image(self, name: str, path: Path) -> None:
        if (name, 0) not in self._points:
            self.log({name: self._trackio.Image(str(path))}, 0)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A later table has a later step."""
        step, last = self._tables.get(name, (-1, None))
        shown = [dict(zip(columns, row, strict=True)) for row in rows]
        if shown != last:
            self._tables[name] = step + 1, shown
            self.log({name: self._trackio.Table(columns=columns, data=rows)}, step + 1)

    def summary(self, values: dict[str, Any]) -> None:
        self.table("summary", ["name", "value"], [[name, value] for name, value in values.items()])

    def finish(self) -> bool:
        logged = set(self._points)
        with _quiet():
            self._trackio.finish()
        self._points.clear()
        self._read()
        return logged <= self._points

    def _read(self) -> None:
        """The points of this run in the database."""
        from trackio.sqlite_storage import SQLiteStorage

        for row in SQLiteStorage.get_logs(self._project, self._name):
            for name, value in row.items():
                if name not in ("step", "timestamp"):
                    self._points.add((name, row["step"]))
                if isinstance(value, dict) and value.get("_type") == self._trackio.Table.TYPE:
                    self._tables[name] = row["step"], value["_value"]


def _run_name(run_folder: Path) -> str:
    """Made once: folders of one name in different places are different runs."""
    state = run_folder / STATE_FILE
    drop_cut_line(state)
    names = [row["trackio"] for _, row in read_json_lines(state) if "trackio" in row] if state.exists() else []
    if not names:
        names = [f"{run_folder.name}-{secrets.token_hex(2)}"]
        append_json_line(state, {"trackio": names[0]})
    return str(names[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the lines that trackio prints at a run's start and end."""
    with redirect_stdout(StringIO()):
        yield
