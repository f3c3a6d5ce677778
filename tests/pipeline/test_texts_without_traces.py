"""A run that scores its layers on texts: long documents, and no traces to train on."""

import json
from pathlib import Path

import pytest

from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.selection.profile import LayerProfile
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder

RECIPE = f"""
name: texts
model: {{base: {REPOSITORY / "data/tiny-reasoner"}, dtype: fp32}}
hybrid:
  lazy_layer_ratio: 0.5
  strategy: gates
  compare: [reach, nll, kl, lazy_ratio]
  w_recent: 12
  calibration: {{source: TEXTS, samples: 2, max_length: 64}}
data: {{max_length: 256}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A recipe and two texts, made of the traces of two ledgers each."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts").mkdir()
    rows = [json.loads(line) for line in (REPOSITORY / "data/ledger/train.jsonl").read_text().splitlines()[:4]]
    for number in range(2):
        text = "\n".join(row["question"] + row["combined_text"] for row in rows[2 * number : 2 * number + 2])
        (folder / f"texts/{number}.txt").write_text(text)
    (folder / "recipe.yaml").write_text(RECIPE.replace("TEXTS", str(folder / "texts")))
    return folder


def test_every_strategy_scores_layers_on_texts_and_a_run_needs_no_traces(inputs, tmp_path) -> None:
    run_in_folder(load_recipe(inputs / "recipe.yaml", ()), tmp_path)
    profile = LayerProfile.load(tmp_path / "texts/profile/profile.json")
    assert profile.strategies == ("gates", "reach", "nll", "kl", "lazy_ratio")
    assert len(profile.samples) == 2
    assert {sample.tokens for sample in profile.samples} == {64}
    assert {sample.id.partition(":")[0] for sample in profile.samples} <= {"0.txt", "1.txt"}
    card = (tmp_path / "texts/export/README.md").read_text()
    assert "`texts`, texts on which the layers were scored" in card


def test_texts_that_changed_are_not_mixed_with_scores_of_before(inputs, tmp_path) -> None:
    recipe = load_recipe(inputs / "recipe.yaml", ("hybrid.strategy=lazy_ratio", "hybrid.compare=[]"))
    run_in_folder(recipe, tmp_path, "profile")
    text = inputs / "texts/1.txt"
    before = text.read_text()
    text.write_text(before + "more")
    try:
        with pytest.raises(UserError, match=r"hybrid\.calibration\.source changed since this run was begun"):
            run_in_folder(recipe, tmp_path, "convert")
    finally:
        text.write_text(before)


def test_texts_within_the_window_are_refused_with_the_sizes_that_would_do(inputs, tmp_path) -> None:
    recipe = load_recipe(inputs / "recipe.yaml", ("hybrid.w_recent=60",))
    with pytest.raises(UserError, match=r"(?s)w_recent: 60: 2 of 2 calibration samples fit .*hybrid\.calibration\.max_length"):
        run_in_folder(recipe, tmp_path, "profile")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hybrid.calibration.source=null"], "data.source + hybrid.calibration.source: missing, so gates has no samples to score"),
        (["train={method: full, learning_rate: 1e-3, max_steps: 1, batch_size: 1}"], "data.source + train: missing, so there is"),
        (["data.heldout=2"], "data.source + data.heldout: missing, so nothing can be held out"),
        (
            ["hybrid.calibration.source=null", "hybrid.strategy=periodic", "hybrid.compare=[]", "hybrid.sink=learned"],
            "data.source + hybrid.calibration.source: missing, so learned sinks have no samples",
        ),
        (["hybrid.calibration.source=nowhere"], "hybrid.calibration.source: nowhere: there is no .txt file in "),
    ],
)
def test_a_recipe_without_traces_is_refused_where_they_are_needed(inputs, overrides, message) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(inputs / "recipe.yaml", overrides)
    assert message in str(refused.value)
