"""A stage's key in its marker: what its result depends on, beside the settings that a begun run cannot change."""

from collections.abc import Sequence
from typing import Any

from lt_train.recipe.schema import Recipe, Train, identity_of
from lt_train.runtime.files import read_json
from lt_train.runtime.fingerprints import file_hash, hash_of
from lt_train.runtime.run_paths import RunPaths


def choice_key(recipe: Recipe) -> str:
    """The settings by which the hybrid was chosen, of those that may change in a begun run."""
    return "" if recipe.hybrid.granularity == "layer" else recipe.hybrid.granularity


def evaluation_key(recipe: Recipe) -> str:
    """The recipe's evaluations, which weights the trained model has, and what the hybrid was chosen by."""
    chosen = [key] if (key := choice_key(recipe)) else []
    return hash_of([identity_of(each) for each in recipe.eval], _published(recipe.train), *chosen)


def export_key(recipe: Recipe, paths: RunPaths) -> str:
    """How to write the export, which weights go into it, and the scores on its card."""
    weights = [path for path in (paths.layers, paths.trained_manifest) if path.is_file()]
    scores = sorted(paths.stage("eval").rglob(paths.scores("", "").name))
    named = [(str(path.relative_to(paths.root)), file_hash(path)) for path in (*weights, *scores)]
    return hash_of(identity_of(recipe.export, without={"push"}), _published(recipe.train), named)


def training_notes(train: Train) -> dict[str, Any]:
    """The settings in the marker of a training that may change afterwards without the trained weights changing."""
    return {name: getattr(train, name) for name in ("keep_best", "deepspeed", "micro_batch_size", "gradient_checkpointing")}


def as_trained(paths: RunPaths, train: Train) -> dict[str, Any]:
    """The notes of the finished training; of one that is not finished, what they would be."""
    marker = paths.marker("train")
    notes = read_json(marker, "stage marker").get("settings") if marker.exists() else None
    return training_notes(train) if notes is None else notes


def compared_when_trained(paths: RunPaths, recipe: Recipe) -> Sequence[str]:
    """`hybrid.compare` when the training was finished: fingerprints of trained weights hold it, which do not depend on it."""
    marker = paths.marker("train")
    noted = read_json(marker, "stage marker").get("compare") if marker.exists() else None
    return recipe.hybrid.compare if noted is None else noted


def _published(train: Train | None) -> tuple[Any, ...] | None:
    if train is None:
        return None
    return train.final_weights, train.keep_best if train.final_weights == "best" else None, train.restore_query_key
