"""What TensorBoard's event files and trackio's database hold of a run."""

import json
from pathlib import Path
from typing import Any


def event_files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").glob("events.out.tfevents.*"))


def _values(run: Path) -> list[tuple[int, Any]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (event.step, value)
        for file in event_files(run)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]


def _plugin(value: Any) -> str:
    return str(value.metadata.plugin_data.plugin_name)


def tensorboard_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) in the order of the steps."""
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for step, value in _values(run):
        if _plugin(value) == "scalars":
            found.setdefault(value.tag, []).append((step, float(make_ndarray(value.tensor))))
    return {name: sorted(points) for name, points in found.items()}


def tensorboard_pictures(run: Path) -> dict[str, int]:
    """How often each is there."""
    tags = [value.tag for _, value in _values(run) if _plugin(value) == "images"]
    return {tag: tags.count(tag) for tag in tags}


def tensorboard_texts(run: Path) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for step, value in _values(run):
        if _plugin(value) == "text":
            found.setdefault(value.tag.removesuffix("/text_summary"), []).append((step, value.tensor.string_val[0].decode()))
    return found


def trackio_rows(run: Path, project: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of each row, by the name that tracking.jsonl has."""
    from trackio.sqlite_storage import SQLiteStorage

    states = map(json.loads, (run / "tracking.jsonl").read_text().splitlines())
    (name,) = (state["trackio"] for state in states if "trackio" in state)
    rows = SQLiteStorage.get_logs(project, name)
    return [(row["step"], {key: value for key, value in row.items() if key not in ("step", "timestamp")}) for row in rows]
