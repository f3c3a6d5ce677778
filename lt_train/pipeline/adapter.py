"""The adapter of a finished training, exported by itself."""

from pathlib import Path

from lt_train.export.adapter import TrainedAdapter, export_adapter
from lt_train.inference.loading import load_base_config
from lt_train.pipeline.provenance import export_metadata
from lt_train.pipeline.run_folder import check_same_base, recipe_of
from lt_train.pipeline.variants import Variants
from lt_train.recipe.evaluations import TRAINED
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import RunPaths


def export_adapter_of(run: Path, out: Path) -> None:
    """Write the adapter that a run trained to the new folder `out`.

    Raises:
        UserError: no run, no adapter in it (yet), its base is another model now, or something is at `out`.
    """
    paths = RunPaths(run)
    recipe = recipe_of(paths)
    if recipe.train is None or recipe.lora is None:
        raise UserError(
            f"{run}: this run trains no adapter (train.method: lora). Fix: lt-train export RECIPE writes the complete model"
        )
    if not paths.marker("train").is_file() or not paths.trained_manifest.is_file():
        raise UserError(f"{run}: its training is not finished. Fix: run lt-train train RECIPE, then this command again")
    check_same_base(paths, recipe)
    spec = Variants(recipe, paths, load_base_config(recipe.model)).spec(TRAINED)
    counts = read_json(paths.marker("train"), "stage marker").get("samples", {})
    adapter = TrainedAdapter(paths.trained, spec, recipe.train.restore_query_key)
    export_adapter(adapter, out, export_metadata(recipe, run, counts))
