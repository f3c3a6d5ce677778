import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.variants import Variants
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import converted_by
from lt_train.runtime.errors import UserError
from lt_train.selection.fingerprint import Fingerprint, Sizes
from lt_train.selection.profile import LayerProfile, SampleScores
from tests.support.families import BASES

RECIPE = """
name: tiny
model: {base: BASE}
hybrid: {lazy_layer_ratio: 0.5, strategy: nll, compare: [periodic, lazy_ratio], w_sink: 2, w_recent: 6}
data: {source: DATA, format: still, max_length: 64, heldout: 4}
train: {method: full, learning_rate: 1.0e-3, max_steps: 1, batch_size: 1}
eval:
  - {benchmark: ledger, path: DATA, max_new_tokens: 8}
"""
PROFILE = LayerProfile(
    Fingerprint("tiny", "", "", "float32", "", Sizes(2, 6, 64, 0.1), ("nll", "lazy_ratio"), {}),
    num_layers=4,
    samples=(SampleScores("a", 40, {"nll": (0.4, 0.1, 0.2, 0.3), "lazy_ratio": (0.9, 0.1, 0.2, 0.8)}, {"nll": 1.0}),),
    fitting=(),
    started="",
)


@pytest.fixture
def variants(tmp_path) -> Callable[..., Variants]:
    """variants(overrides…): those of a run that was begun, in a folder of its own."""
    base, data, path = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(base)
    data.write_text("{}\n")
    path.write_text(RECIPE.replace("BASE", str(base)).replace("DATA", str(data)))
    begun = []

    def make(*overrides: str) -> Variants:
        recipe = load_recipe(path, overrides)
        begun.append(RunFolder(recipe, tmp_path / f"runs-{len(begun)}"))
        with begun[-1].begin():
            made = Variants(recipe, begun[-1].paths, BASES["qwen3"])
            made.choose(PROFILE)
            return made

    return make


def test_a_runs_hybrid_drafts_for_the_base_with_the_kv_heads_that_stream_in_it(variants):
    heads = [[1], [], [0, 1], [0]]
    hybrid = f"hybrid={{streaming_kv_heads: {heads}, w_sink: 2, w_recent: 6}}"
    made = variants(hybrid, "eval.0.variants=[base]", "eval.0.draft=hybrid")
    (eval_config,) = made.recipe.eval
    assert list(map(list, made.draft(BASE, eval_config).spec.streaming_heads(kv_heads=2))) == heads


def test_layers_named_for_a_draft_are_those_that_stream_in_it(variants):
    made = variants("eval.0.variants=[base]", "eval.0.draft=streaming", "eval.0.draft_layers=[0, 2]")
    (eval_config,) = made.recipe.eval
    assert made.draft(BASE, eval_config).spec.lazy_layers == (0, 2)


def test_each_strategy_chooses_the_layers_of_its_own_hybrid_as_many_as_the_recipes_ratio_gives(variants):
    made = variants()
    assert made.spec(CONVERTED) == HybridSpec(4, (1, 2), w_sink=2, w_recent=6)
    assert made.spec(converted_by("lazy_ratio")).lazy_layers == (0, 3)
    assert made.spec(converted_by("periodic")).lazy_layers == (0, 2)


def test_compared_strategies_choose_as_many_layers_as_the_recipe_names(variants):
    made = variants("hybrid.lazy_layer_ratio=null", "hybrid.strategy=null", "hybrid.layers=[3, 1, 0]")
    assert made.spec(CONVERTED).lazy_layers == (0, 1, 3)
    assert made.spec(converted_by("lazy_ratio")).lazy_layers == (0, 2, 3)


def test_training_keeps_the_layers_and_the_base_streams_in_none(variants):
    made = variants()
    assert made.spec(TRAINED) == made.spec(CONVERTED)
    assert made.spec(BASE) == HybridSpec(4, (), w_sink=2, w_recent=6)


def test_the_base_needs_no_choice_of_layers(variants):
    made = variants()
    shutil.rmtree(made.paths.hybrid)
    assert made.spec(BASE).lazy_layers == ()
    with pytest.raises(UserError, match=r"hybrid/layers\.json: cannot read this choice of layers"):
        made.spec(CONVERTED)


def test_a_cut_choice_of_layers_is_refused(variants):
    made = variants()
    path = made.paths.hybrid / "layers.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"hybrid/layers\.json: not a complete choice of layers.*delete it"):
        made.spec(CONVERTED)


def test_layers_that_the_model_lacks_are_refused(variants):
    made = variants()
    path = made.paths.hybrid / "layers.json"
    path.write_text(path.read_text().replace("1", "11"))
    with pytest.raises(HybridError, match="11"):
        made.spec(CONVERTED)


def test_with_the_untrained_hybrid_come_those_it_is_compared_with(variants):
    made = variants("eval.0.variants=[base, converted]")
    compared = [converted_by("periodic"), converted_by("lazy_ratio")]
    assert made.of(made.recipe.eval[0]) == [BASE, CONVERTED, *compared]
    assert made.to_evaluate() == [BASE, *compared, CONVERTED]


def test_what_no_evaluation_requests_is_not_evaluated(variants):
    made = variants()
    assert made.of(made.recipe.eval[0]) == made.to_evaluate() == [TRAINED]
    assert variants("eval=[]").to_evaluate() == []


@torch.no_grad()
def test_untrained_variants_are_the_base_with_their_layers_streaming(variants):
    made = variants("hybrid.w_recent=3")
    ids = torch.randint(2, 96, (1, 30))
    stock = AutoModelForCausalLM.from_pretrained(made.recipe.model.base)
    base, converted = (made.load(variant, torch.float32).cpu() for variant in (BASE, CONVERTED))
    torch.testing.assert_close(base(ids).logits, stock(ids).logits)
    assert converted.spec == made.spec(CONVERTED)
    torch.testing.assert_close(converted(ids).logits[:, :5], stock(ids).logits[:, :5])
    assert (converted(ids).logits[:, -1] - stock(ids).logits[:, -1]).abs().max() > 1e-4


def fingerprints(made: Variants) -> dict[str, str]:
    return {name: made.fingerprint(name) for name in (BASE, CONVERTED, converted_by("lazy_ratio"), TRAINED)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_every_variant_has_a_fingerprint_of_its_own(variants):
    assert len(set(fingerprints(variants()).values())) == 4


def test_two_variants_that_stream_in_the_same_layers_untrained_are_one_model(variants):
    made = variants("hybrid.layers=[0, 3]", "hybrid.lazy_layer_ratio=null", "hybrid.strategy=null")
    assert made.fingerprint(CONVERTED) == made.fingerprint(converted_by("lazy_ratio"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("eval.0.limit=1", "eval.0.samples=4", "eval.0.temperature=0.6"),
        ("eval=[]",),
        ("track.wandb=offline",),
        ("export.dtype=fp32",),
    ],
)
def test_fingerprints_do_not_follow_what_is_free_to_change(variants, overrides):
    assert fingerprints(variants(*overrides)) == fingerprints(variants())


@pytest.mark.parametrize("setting", ["train.learning_rate=2.0e-3", "train.max_steps=2", "seed=1", "data.heldout=5"])
def test_only_the_trained_hybrid_follows_from_its_training(variants, setting):
    assert changed(fingerprints(variants()), fingerprints(variants(setting))) == {TRAINED}


@pytest.mark.parametrize("setting", ["hybrid.w_recent=7", "hybrid.w_sink=1"])
def test_hybrids_follow_from_their_window(variants, setting):
    assert changed(fingerprints(variants()), fingerprints(variants(setting))) >= {
        CONVERTED,
        converted_by("lazy_ratio"),
        TRAINED,
    }


def test_hybrids_follow_from_the_layers_that_stream(variants):
    fewer = fingerprints(variants("hybrid.lazy_layer_ratio=0.25"))
    assert changed(fingerprints(variants()), fewer) == {CONVERTED, converted_by("lazy_ratio"), TRAINED}


def test_every_variant_follows_from_the_bases_weights_and_their_precision(variants):
    before, dtype = fingerprints(variants()), fingerprints(variants("model.dtype=bf16"))
    assert changed(before, dtype) == set(before)
    base = Path(variants().recipe.model.base)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(base)
    assert changed(before, fingerprints(variants())) == set(before)


def test_queries_and_keys_that_one_projection_makes_with_the_values_cannot_be_restored(variants):
    made = variants("train.restore_query_key=true")
    made.check_fits()
    fused = Variants(made.recipe, made.paths, BASES["phi3"])
    with pytest.raises(UserError, match=r"train\.restore_query_key: lt_hybrid_phi3: .*one projection"):
        fused.check_fits()
