"""Markers of runs made by lt_train 0.1, whose keys were hashes of another kind: brought up to date when such a run resumes."""

from typing import Any

from lt_train.pipeline.keys import evaluation_key, export_key, training_notes
from lt_train.recipe.schema import Recipe
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.run_paths import RunPaths

MARKER_FORMAT = 2


def bring_up_to_date(paths: RunPaths, begun: Recipe) -> None:
    """Give each old marker the key of today, from `begun`, the recipe with which the folder was last worked in.

    An evaluation or an export that this recipe changes is thereby not done, as after a change in a run of today.
    """
    made: dict[str, dict[str, Any]] = {
        "train": {"settings": training_notes(begun.train)} if begun.train else {},
        "eval": {"key": evaluation_key(begun)},
        "export": {"key": export_key(begun, paths)},
    }
    for stage in ("profile", "hybrid", "teacher", "train", "eval", "export"):
        marker = paths.marker(stage)
        if marker.exists():
            found: dict[str, Any] = read_json(marker, "stage marker")
            if "format" not in found:
                write_json(marker, found | made.get(stage, {}) | {"format": MARKER_FORMAT})
