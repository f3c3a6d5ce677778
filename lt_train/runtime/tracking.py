"""Tracking of a run: curves, pictures, tables and final scores, in as many trackers as the recipe names.

Each tracker is a file: wandb_tracker.py, tensorboard_tracker.py, trackio_tracker.py. Everything is tracked again when a run
resumes, and a tracker skips what it holds: a process that was killed may have lost what its tracker had not written yet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from lt_train.runtime.tensorboard_tracker import TensorBoardTracker
from lt_train.runtime.trackio_tracker import TrackioTracker
from lt_train.runtime.wandb_tracker import WandbTracker


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Points of curves at an optimizer step. Points that the run holds already are skipped."""

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        """Points of curves that come when their step has long passed. They have an axis of their own, `group`/step.

        Points that the run holds already are skipped.
        """

    def image(self, name: str, path: Path) -> None:
        """Show a picture, once in a run."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table; a later one of the same name replaces it."""

    def summary(self, values: dict[str, Any]) -> None:
        """Final values of the run; a later value of the same name replaces an earlier one."""

    def finish(self) -> bool:
        """Write out what is still in memory, and wait for it. Call it in any case, also after an error.

        Returns whether all that was logged is written. It is not where a tracker's own process has ended, of a signal to all
        processes of a job or for want of memory. The run continues without it; when the run is tracked again, the rest is logged
        again.
        """


class NoTracker:
    """A recipe that names no tracker."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def finish(self) -> bool:
        return True


class Trackers:
    """Several trackers, which get the same."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log_behind(group, metrics, step)

    def image(self, name: str, path: Path) -> None:
        for tracker in self.trackers:
            tracker.image(name, path)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        for tracker in self.trackers:
            tracker.table(name, columns, rows)

    def summary(self, values: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.summary(values)

    def finish(self) -> bool:
        return all([tracker.finish() for tracker in self.trackers])  # a list: each is finished


def open_tracker(
    mode: Literal["online", "offline", "off"],
    project: str,
    run_folder: Path,
    config: dict[str, Any],
    *,
    tensorboard: bool = False,
    trackio: bool = False,
) -> Tracker:
    """Start tracking, or resume the tracking of `run_folder`.

    Args:
        mode: of wandb.
        config: the resolved recipe, shown as the run's configuration.
        tensorboard, trackio: whether to track there, too.

    Raises:
        UserError: a tracker cannot start: no login, no network.
    """
    opened: list[Tracker] = []
    try:
        if tensorboard:
            opened.append(TensorBoardTracker(run_folder, config))
        if trackio:
            opened.append(TrackioTracker(project, run_folder, config))
        if mode != "off":
            opened.append(WandbTracker(mode, project, run_folder, config))
    except BaseException:
        Trackers(opened).finish()
        raise
    return opened[0] if len(opened) == 1 else Trackers(opened) if opened else NoTracker()
