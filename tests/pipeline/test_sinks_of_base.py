"""A run on a base that has learned sinks of its own, experts and sliding layers (gpt-oss), and what such a base cannot do."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, GptOssConfig

from lt_train.runtime.errors import UserError
from tests.support.runs import run_in_folder
from tests.support.tiny_run import REASONER, add_base, every_stage, recipe_on_base

TOKENS = AutoConfig.from_pretrained(REASONER)
BASE = GptOssConfig(
    vocab_size=TOKENS.vocab_size,
    pad_token_id=TOKENS.pad_token_id,
    eos_token_id=TOKENS.eos_token_id,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    sliding_window=24,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def inputs(inputs: Path) -> Path:
    add_base(inputs, BASE)
    return inputs


@pytest.mark.slow
def test_a_run_scores_trains_evaluates_and_exports_it_and_leaves_its_sinks_as_they_are(inputs, tmp_path) -> None:
    run_in_folder(recipe_on_base(inputs, *every_stage(inputs)), tmp_path)
    run = tmp_path / "tiny"
    (chosen,) = json.loads((run / "hybrid/layers.json").read_text())["converted"]
    assert chosen in (1, 3), "the full layers of the base"
    weights, before = load_file(run / "export/model.safetensors"), load_file(inputs / "base/model.safetensors")
    changed = {name for name, weight in weights.items() if not weight.equal(before[name])}
    assert changed and all(f".{chosen}.self_attn." in name and "sinks" not in name for name in changed)
    config = json.loads((run / "export/config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["w_recent"]) == ("lt_hybrid_gpt_oss", 24, 12)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ("hybrid.granularity=kv_head", "hybrid.strategy=gates"),
            r"split_layers: each query head of the base has a learned sink, .* Fix: let entire layers stream",
        ),
        (("hybrid.sink=learned", "hybrid.w_sink=0"), r"learned_sinks: each layer of the base has some, which stay"),
    ],
)
def test_what_such_a_base_cannot_do_is_refused_before_anything_runs(inputs, tmp_path, overrides, reason) -> None:
    with pytest.raises((UserError, ValueError), match=reason):
        run_in_folder(recipe_on_base(inputs, *overrides, "hybrid.compare=[]"), tmp_path)
    assert not (tmp_path / "tiny/profile").exists()
