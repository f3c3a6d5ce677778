"""A run whose streaming layers have learned sinks, from recipe to export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lt_train.hybrid.loading import load_hybrid_checkpoint
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.report.results import read_results
from lt_train.runtime.errors import UserError
from lt_train.selection.profile import LayerProfile
from tests.support.runs import run_in_folder

OVERRIDES = ("hybrid.w_sink=0", "hybrid.sink=learned", "hybrid.calibration.sink_steps=3", 'hybrid.compare=["periodic"]')
EVAL = "eval=[{benchmark: heldout_loss, batch_size: 4, variants: [base, converted, trained]}]"


@pytest.fixture(scope="module")
def recipe(inputs) -> Recipe:
    return load_recipe(inputs / "recipe.yaml", (*OVERRIDES, EVAL))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_in_folder(recipe, runs)


def variants_of(recipe: Recipe, runs: Path, process=None):
    return RunContext(recipe, RunFolder(recipe, runs), None, process).variants


def test_each_untrained_hybrid_has_sinks_of_its_own_and_the_trained_one_begins_with_the_recipes(finished, recipe):
    runs, printed = finished
    made = variants_of(recipe, runs)
    files = [load_file(runs / f"tiny/hybrid/sinks-{name}.safetensors") for name in (CONVERTED, "converted-by-periodic")]
    assert len(files[0]) == len(files[1]) == 4 and files[0].keys() != files[1].keys()
    assert made.sinks(TRAINED) == made.sinks(CONVERTED)
    assert "fitting the learned sinks of converted: 3 steps" in printed
    assert "16 logits fitted: loss" in printed


def test_further_strategies_of_a_finished_run_are_scored_and_measured_and_nothing_else_is(finished, inputs, tmp_path):
    shutil.copytree(finished[0] / "tiny", run := tmp_path / "tiny")
    further = load_recipe(inputs / "recipe.yaml", (*OVERRIDES[:3], "hybrid.compare=[nll, periodic]", EVAL))
    kept = [*run.glob("eval/*/*/scores.json"), *run.glob("hybrid/sinks-*"), *run.rglob("train/final/*")]
    before, scored = {path: path.stat().st_mtime_ns for path in kept}, LayerProfile.load(run / "profile/profile.json")
    printed = run_in_folder(further, tmp_path, "eval")
    assert {path: path.stat().st_mtime_ns for path in kept} == before and len(kept) > 8
    joined, added = (LayerProfile.load(run / f"profile/{name}profile.json") for name in ("", "nll/"))
    assert joined.scores == scored.scores | added.scores and joined.strategies == ("reach", "nll")
    assert joined.mean_all_streaming("reach") == scored.mean_all_streaming("reach") != joined.mean_all_streaming("nll")
    assert json.loads((run / "hybrid/layers.json").read_text())["converted-by-nll"] == list(added.choose("nll", 4))
    assert {result.variant for result in read_results(run)} >= {"converted-by-nll", "converted-by-periodic", "trained"}
    assert "by nll, " in printed and "fitting the learned sinks of converted-by-nll" in printed
    assert "fitting the learned sinks of converted:" not in printed
    assert "scoring" not in run_in_folder(further, tmp_path, "eval")


def test_layers_are_scored_with_sink_tokens_in_place_of_sinks_that_are_not_fitted_yet(finished):
    profile = json.loads((finished[0] / "tiny/profile/profile.json").read_text())
    assert profile["fingerprint"]["sizes"]["w_sink"] == 4


def test_the_export_holds_the_trained_sinks_and_describes_them(finished, recipe):
    run = finished[0] / "tiny"
    exported, began = load_file(run / "export/model.safetensors"), load_file(run / "hybrid/sinks-converted.safetensors")
    trained = variants_of(recipe, finished[0]).load(TRAINED, torch.float32).state_dict()
    for name, logits_H in began.items():
        assert torch.equal(exported[name], trained[name]) and not torch.equal(exported[name], logits_H)
    ids = torch.arange(2, 42)[None]
    model = load_hybrid_checkpoint(run / "export")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, variants_of(recipe, finished[0]).load(TRAINED, torch.float32)(ids).logits)
    card = (run / "export/README.md").read_text()
    assert "a learned logit for each query head" in card and "no sinks by" in card and "hybrid code 2" in card


def test_an_evaluation_follows_from_the_sinks(finished, recipe, tmp_path):
    made = variants_of(recipe, finished[0])
    before = [made.fingerprint(variant) for variant in (CONVERTED, TRAINED)]
    file = made.sinks(CONVERTED)
    kept, changed = file.read_bytes(), {name: value + 1 for name, value in load_file(file).items()}
    save_file(changed, file)
    after = [made.fingerprint(variant) for variant in (CONVERTED, TRAINED)]
    file.write_bytes(kept)
    assert not set(before) & set(after)
    assert [made.fingerprint(variant) for variant in (CONVERTED, TRAINED)] == before


def test_a_hybrid_whose_sinks_are_gone_is_converted_again(finished, recipe, tmp_path):
    runs = shutil.copytree(finished[0], tmp_path / "runs")
    (runs / "tiny/hybrid/sinks-converted.safetensors").unlink()
    printed = run_in_folder(recipe, runs, "convert")
    assert "fitting the learned sinks of converted" in printed
    here, there = (load_file(root / "tiny/hybrid/sinks-converted.safetensors") for root in (runs, finished[0]))
    torch.testing.assert_close(here, there, atol=0, rtol=0)


def test_samples_shorter_than_the_window_cannot_fit_sinks(recipe, tmp_path):
    named = {"w_recent": 4000, "layers": [1, 2], "strategy": None, "lazy_layer_ratio": None, "compare": []}
    wide = recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update=named)})
    with pytest.raises(UserError, match=r"hybrid\.w_recent: 4000: 2 of 2 calibration samples fit inside the window"):
        run_in_folder(wide, tmp_path, "convert")
