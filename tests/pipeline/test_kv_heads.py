"""A run whose single KV heads stream, from recipe to export, and what a change of the granularity does again."""

import json
import shutil
from pathlib import Path

import pytest

from lt_train.hybrid.spec import HybridSpec
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.evaluations import CONVERTED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.report.contents import read_run_results, read_runs
from lt_train.report.page import render, summary
from lt_train.report.provenance import provenance
from lt_train.report.results import read_results
from lt_train.runtime.errors import UserError
from lt_train.selection.profile import LayerProfile
from tests.support.runs import run_in_folder

EVAL = "eval=[{benchmark: heldout_loss, batch_size: 4, variants: [base, converted]}]"
STEADY = ("hybrid.w_recent=32", "hybrid.calibration.samples=4", "hybrid.calibration.long_reach_fraction=0.5")
"""With these the shares of the tiny reasoner's KV heads add up to the measured rise."""
UNTRAINED = ("train=null", EVAL, "hybrid.strategy=gates", *STEADY)
CHOICE = ("hybrid.granularity=kv_head", "hybrid.lazy_layer_ratio=0.7")
BY_HEAD = (*UNTRAINED, *CHOICE)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """A trained run by KV heads, with the hybrid of as many layers by gates beside it."""
    runs, variants = tmp_path_factory.mktemp("runs"), "variants: [base, converted, trained]"
    answers = f"{{benchmark: ledger, path: {inputs / 'problems.jsonl'}, limit: 4, max_new_tokens: 8, draft: streaming}}"
    evaluations = f"eval=[{{benchmark: heldout_loss, batch_size: 4, {variants}}}, {answers}]"
    recipe = load_recipe(inputs / "recipe.yaml", ("hybrid.strategy=gates", *STEADY, *CHOICE, "hybrid.compare=[gates]", evaluations))
    return runs, run_in_folder(recipe, runs)


def variants_of(recipe: Recipe, runs: Path):
    return RunContext(recipe, RunFolder(recipe, runs), None, None).variants


def test_the_heads_with_the_smallest_shares_stream_and_the_run_reports_them(finished) -> None:
    runs, printed = finished
    profile = LayerProfile.load(runs / "tiny/profile/profile.json")
    chosen = json.loads((runs / "tiny/hybrid/layers.json").read_text())
    spec = HybridSpec.from_streaming_heads(chosen["converted"], kv_heads=2, w_sink=4, w_recent=32)
    assert spec.split_layers and chosen["converted"] == list(map(list, profile.choose_heads(11)))
    assert chosen["converted-by-gates"] == list(profile.choose("gates", 6))  # 11 of 16 heads are nearest to 6 of 8 layers
    split = len(spec.lazy_layers) + len(spec.split_layers)
    rise = f"(predicted rise on long-reach tokens {profile.predicted_rise(spec):.3g} nats)"
    assert f"11 of 16 KV heads stream in {split} layers, chosen by gates {rise}: " in printed
    assert "gates: the halves of the samples choose" in printed and "of 11 KV heads alike" in printed
    config = json.loads((runs / "tiny/hybrid/config.json").read_text())
    assert (config["streaming_kv_heads"], config["hybrid_version"]) == (chosen["converted"], "3")


def test_results_and_report_distinguish_heads_from_layers(finished) -> None:
    runs, _ = finished
    base, by_layers, by_head, trained, answers = read_results(runs / "tiny")
    assert (by_layers.label, by_head.label) == ("gates, untrained", "gates by head, untrained")
    assert trained.label == answers.label == "gates by head, trained"
    assert len({result.scores.loss for result in (base, by_layers, by_head, trained)}) == 4
    assert by_layers.kv_bytes < by_head.kv_bytes < base.kv_bytes
    (run,) = read_runs([runs / "tiny"])
    assert ("streams", "11 of 16 KV heads, chosen by gates") in summary(run)
    assert any(name == "streaming KV heads of other layers" for name, _ in provenance(run))
    assert "11 of 16 KV heads stream in" in render([run])
    assert read_run_results(runs / "tiny").layers["converted"] == by_head.streaming_kv_heads


def test_the_export_is_the_trained_hybrid_of_heads(finished) -> None:
    run = finished[0] / "tiny"
    chosen, config = (json.loads((run / name).read_text()) for name in ("hybrid/layers.json", "export/config.json"))
    assert config["streaming_kv_heads"] == chosen["converted"] and config["model_type"].startswith("lt_hybrid")
    assert "11 of its 16 key/value heads" in (run / "export/README.md").read_text()
    assert "of the draft's tokens accepted" in finished[1]


def test_each_choice_of_heads_is_another_model(inputs, tmp_path) -> None:
    """`repr` of a spec, of which other fingerprints are made, does not name the heads."""
    named = (*UNTRAINED[:2], "hybrid.strategy=null", "hybrid.lazy_layer_ratio=null")
    found = set()
    for head in (0, 1):
        heads = f"hybrid.streaming_kv_heads=[[{head}], [], [], [], [], [], [], []]"
        recipe = load_recipe(inputs / "recipe.yaml", (*named, heads, f"name=head-{head}"))
        folder = RunFolder(recipe, tmp_path)
        with folder.begin():
            made = variants_of(recipe, tmp_path)
            made.choose(None)
            found.add(made.fingerprint(CONVERTED))
    assert len(found) == 2


@pytest.fixture
def profiled(finished, tmp_path) -> Path:
    """A folder of runs in which the layers of this one are scored."""
    shutil.copytree(finished[0] / "tiny/profile", tmp_path / "tiny/profile")
    return tmp_path


def test_a_changed_granularity_chooses_and_measures_again_and_does_not_score_again(inputs, profiled) -> None:
    by_layers = load_recipe(inputs / "recipe.yaml", (*UNTRAINED, "hybrid.lazy_layer_ratio=0.7"))
    run_in_folder(by_layers, profiled, "eval")
    run = profiled / "tiny"
    scored, picture = (run / "profile/profile.json").stat().st_mtime_ns, (run / "profile/curve.png").read_bytes()
    before = json.loads((run / "eval/converted/heldout_loss/scores.json").read_text())
    printed = run_in_folder(load_recipe(inputs / "recipe.yaml", BY_HEAD), profiled, "eval")
    assert "11 of 16 KV heads stream" in printed and "what streams changed: the previous scores are now in" in printed
    assert (run / "profile/profile.json").stat().st_mtime_ns == scored
    assert (run / "profile/curve.png").read_bytes() != picture
    assert json.loads((run / "eval/converted/heldout_loss/scores.json").read_text())["loss"] != before["loss"]
    assert json.loads((run / "eval-converted-1/heldout_loss/scores.json").read_text()) == before
    assert "6 of 8 layers stream" in run_in_folder(by_layers, profiled, "eval")


def test_the_granularity_of_a_trained_run_stays(inputs, profiled) -> None:
    run_in_folder(load_recipe(inputs / "recipe.yaml", (*UNTRAINED, "eval=[]")), profiled, "convert")
    (profiled / "tiny/train").mkdir()
    with pytest.raises(
        UserError, match=r"hybrid\.granularity: kv_head: .*tiny/train was trained while others .*Fix: give this recipe"
    ):
        run_in_folder(
            load_recipe(inputs / "recipe.yaml", (*BY_HEAD, "eval=[]", "hybrid.lazy_layer_ratio=0.5")), profiled, "convert"
        )
