"""The curves, pictures and scores of a run in wandb: online, or offline (no network, no login).

A run keeps one wandb id over all its resumes, and every point is logged once. wandb gives each resume a folder of its own, and
offline starts it at step 0. A killed process loses what wandb had not written yet, so a resume reads from the folders which points
are there. tracking.jsonl, beside them, has the id, and the last step of a tracker that was finished: that is all that is known once
`wandb clean` has deleted the folders.
"""

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lt_train.runtime.errors import UserError
from lt_train.runtime.files import append_json_line, drop_cut_line, read_json_lines
from lt_train.runtime.wandb_files import history

STATE_FILE = "tracking.jsonl"
LOGIN_SECONDS = 30.0  # how long to wait for wandb's server before saying so
FLUSH_SECONDS = 1.0  # how often wandb writes out what is logged


@dataclass
class _Held:
    """The content of the run's wandb folders."""

    points: set[tuple[str, float]] = field(default_factory=set)  # of the curves: (name, step)
    pictures: set[str] = field(default_factory=set)
    row: int = 0  # the last one, as wandb numbers them
    noted_step: int = 0  # up to here all points were in folders that are gone

    def add_row(self, row: dict[str, Any]) -> None:
        self.row = max(self.row, row["_step"])
        for name, value in row.items():
            step = row.get(f"{name.split('/')[0]}/step", row.get("step"))
            if name.endswith("/_type") and value == "image-file":
                self.pictures.add(name.removesuffix("/_type"))
            elif step is not None and not name.startswith("_"):
                self.points.add((name, step))

    def without(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        """The points at a step that are not held."""
        if step <= self.noted_step:
            return {}
        return {name: value for name, value in values.items() if (name, step) not in self.points}


class WandbTracker:
    def __init__(self, mode: Literal["online", "offline"], project: str, run_folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._state = run_folder / STATE_FILE
        run_id, noted = _read_state(self._state)
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=LOGIN_SECONDS, x_transaction_log_flush_interval=FLUSH_SECONDS
        )
        try:
            self._run = wandb.init(
                mode=mode,
                project=project,
                name=run_folder.name,
                id=run_id,
                resume="allow" if mode == "online" else None,  # offline there is no server to resume from
                dir=run_folder,
                config=config,
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"track.wandb: {mode}: wandb cannot start: {error}. Log in (wandb login), or set track.wandb to offline or off"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        files = set(run_folder.glob(f"wandb/*run-*/run-{run_id}.wandb")) - set(Path(self._run.sync_dir).glob("*.wandb"))
        self._held = _read_held(files, self._run.starting_step if mode == "online" else None) if files else noted
        self._row = max(self._held.row + 1, self._run.starting_step)
        self._step_of_row: int | None = None
        self._groups_of_row: set[str] = set()
        self._is_connected = True

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self._step_of_row not in (None, step):
            self._begin_row()
        new = self._held.without(metrics, step)
        if new:
            self._row, self._step_of_row = max(self._row, step), step
            self._log_points(new, "step", step)

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        new = self._held.without({f"{group}/{name}": value for name, value in metrics.items()}, step)
        if new:
            axis = f"{group}/step"
            with self._noticing_disconnection():
                self._run.define_metric(axis)
                self._run.define_metric(f"{group}/*", step_metric=axis)
            if group in self._groups_of_row:  # a row has one point of a curve
                self._begin_row()
            self._groups_of_row.add(group)
            self._log_points(new, axis, step)

    def image(self, name: str, path: Path) -> None:
        if name not in self._held.pictures:
            self._held.pictures.add(name)
            self._log({name: self._wandb.Image(str(path))})

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._log({name: self._wandb.Table(columns=columns, data=rows)})

    def summary(self, values: dict[str, Any]) -> None:
        with self._noticing_disconnection():
            self._run.summary.update(values)

    def finish(self) -> bool:
        with self._noticing_disconnection():
            self._run.finish()
        with self._noticing_disconnection():
            self._wandb.teardown()  # finish() returns while wandb's own process still writes
        if self._is_connected:
            self._note_held()
        return self._is_connected

    def _note_held(self) -> None:
        for name in sorted(self._held.pictures):
            append_json_line(self._state, {"image": name})
        append_json_line(self._state, {"saved_step": max((step for _, step in self._held.points), default=self._held.noted_step)})

    def _log_points(self, points: dict[str, Any], axis: str, step: int) -> None:
        self._held.points.update((name, step) for name in points)
        self._log({**points, axis: step})

    def _log(self, values: dict[str, Any]) -> None:
        with self._noticing_disconnection():
            self._run.log(values, step=self._row)  # wandb writes the row when a later one begins

    @contextmanager
    def _noticing_disconnection(self) -> Iterator[None]:
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            if self._is_connected:
                warnings.warn(f"track.wandb: wandb's own process has ended ({error}); nothing more is tracked", stacklevel=2)
            self._is_connected = False

    def _begin_row(self) -> None:
        """wandb's own steps number the rows, and may only grow; the axes of the curves are metrics of ours."""
        self._row += 1
        self._step_of_row = None
        self._groups_of_row = set()


def _read_held(files: set[Path], arrived_rows: int | None) -> _Held:
    """
    Args:
        files: of all earlier processes of the run.
        arrived_rows: online, how many rows the server has; those after them are not held.
    """
    held = _Held()
    for row in (row for file in files for row in history(file)):
        if arrived_rows is None or row["_step"] < arrived_rows:
            held.add_row(row)
    return held


def _read_state(path: Path) -> tuple[str, _Held]:
    """The run's id, a new one where there is none, and what its folders held when it was finished last."""
    drop_cut_line(path)
    rows = [row for _, row in read_json_lines(path)] if path.exists() else []
    ids = [row["run_id"] for row in rows if "run_id" in row]
    if not ids:
        ids = [secrets.token_hex(4)]
        append_json_line(path, {"run_id": ids[0]})
    step = max((row["saved_step"] for row in rows if "saved_step" in row), default=0)
    return ids[0], _Held(pictures={row["image"] for row in rows if "image" in row}, row=step, noted_step=step)
