"""train/log.jsonl: one row per logged step, which a resumed run continues."""

from pathlib import Path
from typing import Any

from lt_train.runtime.files import append_json_line, drop_cut_line, read_json_lines
from lt_train.runtime.tracking import Tracker


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a training in order of steps, as without interruptions. No file: no rows.

    A row {"resumed_from": n} marks a resume from step n: the rows before it with later steps are dropped.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for _, row in read_json_lines(path):
        if "resumed_from" in row:
            rows = [r for r in rows if r["step"] <= row["resumed_from"]]
        else:
            rows.append(row)
    return rows


def resume_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Prepare the log for a run that resumes from `step` (0: the start). Returns the rows up to that step."""
    drop_cut_line(path)
    if path.exists():
        append_json_line(path, {"resumed_from": step})
    return read_log(path)


def track_row(tracker: Tracker, row: dict[str, Any]) -> None:
    tracker.log({f"train/{name}": value for name, value in row.items() if name != "step"}, step=row["step"])


def track_log(tracker: Tracker, path: Path) -> None:
    """Log all rows again: a killed process may not have sent the last ones to wandb. The tracker skips those it has."""
    drop_cut_line(path)
    for row in read_log(path):
        track_row(tracker, row)
