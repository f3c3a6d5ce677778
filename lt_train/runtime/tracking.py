"""Curves, pictures and scores of a run in wandb: online, offline (no network, no login), or not at all.

A run keeps one wandb id over all its resumes, and every step is logged once. wandb itself starts each offline resume at
step 0 in a folder of its own, so the id and the last step that is safely in a folder are kept beside them, in tracking.jsonl.
"""

import secrets
from pathlib import Path
from typing import Any, Literal, Protocol

from lt_train.runtime.errors import UserError
from lt_train.runtime.files import append_json_line, drop_cut_line, read_json_lines

STATE_FILE = "tracking.jsonl"
LOGIN_SECONDS = 30.0  # how long to wait for wandb's server before saying so


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Points of curves at an optimizer step. Steps that an earlier segment of the run holds already are passed over."""

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        """Points of curves that come when their step has long passed. They have an axis of their own, `group`/step."""

    def image(self, name: str, path: Path) -> None:
        """Show a picture, once in a run."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table; a later one of the same name replaces it."""

    def summary(self, values: dict[str, Any]) -> None:
        """Final figures of the run; a later value of the same name replaces an earlier one."""

    def finish(self) -> None:
        """Write out what is still in memory. Call it in any case, also after an error."""


class NoTracker:
    """`track.wandb: off`."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


def open_tracker(mode: Literal["online", "offline", "off"], project: str, run_folder: Path, config: dict[str, Any]) -> Tracker:
    """Start tracking, or go on with the wandb run that `run_folder` has begun.

    Args:
        mode: "online", "offline" or "off".
        config: the resolved recipe, shown as the run's configuration.

    Raises:
        UserError: wandb cannot start: no login, no network.
    """
    if mode == "off":
        return NoTracker()
    return WandbTracker(mode, project, run_folder, config)


class WandbTracker:
    def __init__(self, mode: Literal["online", "offline"], project: str, run_folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._state = run_folder / STATE_FILE
        run_id, self._saved_step, self._images = _read_state(self._state)
        self._step = self._saved_step
        settings = wandb.Settings(silent=True, console="off", init_timeout=LOGIN_SECONDS)
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

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step <= self._saved_step:
            return
        self._run.log({**metrics, "step": step}, step=step)
        if step > self._step:  # wandb writes a step's row when a later step begins
            self._note_saved(self._step)
            self._step = step

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        axis = f"{group}/step"
        self._run.define_metric(axis)
        self._run.define_metric(f"{group}/*", step_metric=axis)
        # wandb's own steps may only grow, so the points lie in the row of the step that is under way
        self._run.log({**{f"{group}/{name}": value for name, value in metrics.items()}, axis: step}, step=self._step)

    def image(self, name: str, path: Path) -> None:
        if name in self._images:
            return
        self._run.log({name: self._wandb.Image(str(path))}, step=self._step)
        self._images.add(name)
        append_json_line(self._state, {"image": name})

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._run.log({name: self._wandb.Table(columns=columns, data=rows)}, step=self._step)

    def summary(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def finish(self) -> None:
        self._run.finish()
        self._note_saved(self._step)

    def _note_saved(self, step: int) -> None:
        if step > self._saved_step:
            append_json_line(self._state, {"saved_step": step})


def _read_state(path: Path) -> tuple[str, int, set[str]]:
    """(run id, last step that wandb's folders hold, names of the pictures they hold); a new id where there is none."""
    drop_cut_line(path)
    rows = [row for _, row in read_json_lines(path)] if path.exists() else []
    ids = [row["run_id"] for row in rows if "run_id" in row]
    if not ids:
        ids = [secrets.token_hex(4)]
        append_json_line(path, {"run_id": ids[0]})
    saved_step = max((row["saved_step"] for row in rows if "saved_step" in row), default=0)
    return ids[0], saved_step, {row["image"] for row in rows if "image" in row}
