from dataclasses import replace
from pathlib import Path

import pytest

from lt_train.evaluation.scores import AnswerScores, LossScores, write_scores
from lt_train.evaluation.statistics import Interval, TokenLoss
from lt_train.export.metadata import ReportedScore
from lt_train.hybrid.loading import hybrid_config
from lt_train.hybrid.spec import HybridSpec
from lt_train.pipeline.provenance import export_metadata
from lt_train.pipeline.run_folder import PACKAGES
from lt_train.recipe.loading import load_recipe, resolved_yaml
from lt_train.recipe.schema import Recipe
from lt_train.runtime.files import write_json, write_text
from tests.support.families import BASES

RECIPE = """
name: tiny
model: {base: nobody/nothing, revision: v2}
hybrid: {lazy_layer_ratio: 0.5, strategy: reach}
data: {source: nobody/traces, format: messages, max_length: 64, heldout: 4, packing: true}
train: {method: lora, learning_rate: 1.0e-3, max_steps: 7, batch_size: 2}
lora: {rank: 8, layers: all}
eval:
  - {benchmark: ledger, samples: 4, temperature: 0.6, max_new_tokens: 8, variants: [base, trained]}
  - {benchmark: heldout_loss}
  - {benchmark: heldout_kl}
"""


def recipe_with(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs/tiny"
    write_text(folder / "recipe.yaml", resolved_yaml(recipe_with(tmp_path)))
    write_json(folder / "hybrid/layers.json", {"converted": [0, 2]})
    hybrid_config(BASES["qwen3"], HybridSpec(4, (0, 2))).save_pretrained(folder / "hybrid")
    return folder


def test_an_export_names_base_data_and_how_the_layers_were_chosen(tmp_path, run):
    metadata = export_metadata(recipe_with(tmp_path), run, {"rows": 9})
    assert (metadata.recipe, metadata.base, metadata.base_revision, metadata.selection) == ("tiny", "nobody/nothing", "v2", "reach")
    assert (metadata.data, metadata.data_format, metadata.data_counts) == ("nobody/traces", "messages", {"rows": 9})
    assert metadata.versions.keys() == set(PACKAGES)


def test_layers_of_the_recipe_are_reported_as_given_there(tmp_path, run):
    given = recipe_with(tmp_path, "hybrid.lazy_layer_ratio=null", "hybrid.strategy=null", "hybrid.layers=[0, 2]")
    assert export_metadata(given, run, {}).selection == "given in the recipe"


def test_an_export_names_the_settings_that_shaped_its_training_and_no_others(tmp_path, run):
    assert export_metadata(recipe_with(tmp_path), run, {}).training == {
        "method": "lora",
        "learning_rate": 1e-3,
        "max_steps": 7,
        "batch_size": 2,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_length": 64,
        "packing": True,
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_layers": "all",
    }


def test_full_training_has_no_settings_of_lora_and_a_training_free_hybrid_has_none_at_all(tmp_path, run):
    full = export_metadata(recipe_with(tmp_path, "train.method=full", "lora=null"), run, {}).training
    assert full["method"] == "full" and not any(name.startswith("lora") for name in full)
    free = recipe_with(tmp_path, "train=null", "lora=null", "eval=[]")
    assert export_metadata(free, run, {}).training is None


def test_the_card_states_what_was_distilled_trained_and_put_back(tmp_path, run):
    distilled = recipe_with(tmp_path, "train.distill.weight=0.5", "train.restore_query_key=true")
    metadata = export_metadata(distilled, run, {}).training
    assert metadata["distill_weight"] == 0.5 and metadata["distill_teacher"] == "auto" and "distill_top_k" not in metadata
    assert "put back" in metadata["queries and keys of full-attention layers"]
    part = recipe_with(tmp_path, "train.method=full", "lora=null", "train.parameters=lazy_projections")
    assert export_metadata(part, run, {}).training["parameters"] == "lazy_projections"


def test_every_score_of_the_run_goes_with_the_export_with_its_error_and_number(tmp_path, run):
    answers = AnswerScores("ledger", 2, 2, 4, 0.5, 0.25, 0.5, None, 0, 0.0, 0.0, 0, 8, 1.0, 2.0, {}, {"a": 0.25, "b": 0.75})
    answers = replace(answers, interval=Interval(0.1, 0.9))
    losses = LossScores("heldout_loss", 1, 10, 1.5, None, {}, {"a": TokenLoss(15.0, 10)})
    write_scores(run / "eval/base/ledger/scores.json", answers)
    write_scores(run / "eval/trained/heldout_loss/scores.json", losses)
    write_scores(run / "eval/trained/heldout_kl/scores.json", replace(losses, benchmark="heldout_kl", loss=0.25))
    assert export_metadata(recipe_with(tmp_path), run, {}).scores == (
        ReportedScore("base", "ledger", "avg@4", 0.5, 0.25, (0.1, 0.9), 2),
        ReportedScore("trained", "heldout_loss", "loss", 1.5, None, None, 1),
        ReportedScore("trained", "heldout_kl", "KL to base", 0.25, None, None, 1),
    )


@pytest.mark.parametrize(
    ("benchmark", "changed", "metric"),
    [
        ("ledger", {"partial": True, "missing": 3}, "avg@4 (3 samples missing)"),
        ("ledger", {"truncated_as": "graded"}, "avg@4 (truncated answers graded)"),
        ("needle", {"truncated_as": "graded"}, "avg@4"),  # always, by its own limit
    ],
)
def test_a_partial_score_or_one_of_graded_truncated_answers_is_marked_in_the_card(tmp_path, run, benchmark, changed, metric):
    answers = AnswerScores(benchmark, 2, 2, 4, 0.5, 0.25, 0.5, None, 0, 0.0, 0.0, 0, 8, 1.0, 2.0, {}, {"a": 0.25, "b": 0.75})
    write_scores(run / "eval/base/ledger/scores.json", replace(answers, **changed))
    (score,) = export_metadata(recipe_with(tmp_path), run, {}).scores
    assert score.metric == metric
