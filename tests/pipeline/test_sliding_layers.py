"""A run on a base of which some layers have a window from the start, from its scores to its checked export."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, Olmo3Config

from lt_train.export.manifest import read_manifest
from lt_train.report.contents import read_runs
from lt_train.report.page import render
from lt_train.report.provenance import provenance
from lt_train.report.results import read_results
from lt_train.runtime.errors import UserError
from lt_train.selection.profile import LayerProfile
from tests.support.runs import run_in_folder
from tests.support.tiny_run import REASONER, add_base, every_stage, recipe_on_base

WINDOW = 24
TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
TOKENS = AutoConfig.from_pretrained(REASONER)
BASE = Olmo3Config(
    vocab_size=TOKENS.vocab_size,
    pad_token_id=TOKENS.pad_token_id,
    eos_token_id=TOKENS.eos_token_id,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    layer_types=TYPES,
    sliding_window=WINDOW,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
    },
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def inputs(inputs: Path) -> Path:
    add_base(inputs, BASE)
    return inputs


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    return runs / "tiny", run_in_folder(recipe_on_base(inputs, *every_stage(inputs)), runs)


def test_only_full_layers_are_scored_and_chosen_and_half_of_them_stream(finished) -> None:
    run, printed = finished
    profile = LayerProfile.load(run / "profile/profile.json")
    assert profile.sliding_layers == (0, 3)
    for strategy in profile.strategies:
        for scores in profile.scores[strategy]:
            assert [layer for layer, score in enumerate(scores) if score == 0] == [0, 3]
    chosen = json.loads((run / "hybrid/layers.json").read_text())
    assert set(chosen) == {"converted", "converted-by-lazy_ratio", "converted-by-periodic"}
    assert all(len(layers) == 2 and not {0, 3} & set(layers) for layers in chosen.values())
    assert "2 of 4 full layers stream, chosen by reach: " in printed
    assert (run / "profile/profile.png").stat().st_size > 0


def test_training_changes_the_streaming_layers_alone(finished) -> None:
    run, _ = finished
    chosen = json.loads((run / "hybrid/layers.json").read_text())["converted"]
    trained = {int(name.split(".layers.")[1].split(".")[0]) for name in load_file(next(run.rglob("adapter_model.safetensors")))}
    assert sorted(trained) == chosen


def test_results_report_and_export_report_what_slides(finished) -> None:
    run, printed = finished
    base, *hybrids = read_results(run)
    assert base.num_layers == 4
    of_token = 2 * 2 * 8 * 4  # keys and values, heads, their size, fp32
    assert base.kv_bytes == of_token * (4 * 32768 + 2 * WINDOW)
    assert hybrids[0].kv_bytes == of_token * (2 * 32768 + 2 * 16 + 2 * WINDOW)
    (read,) = read_runs([run])
    assert ("layers with a window of 24 in the base", "0, 3") in provenance(read)
    assert "2 of 4 full layers" in render([read]) and "12 recent tokens" in render([read])
    config, card = json.loads((run / "export/config.json").read_text()), (run / "export/README.md").read_text()
    assert (config["model_type"], config["layer_types"], config["sliding_window"]) == ("lt_hybrid_olmo3", TYPES, WINDOW)
    assert (config["w_recent"], config["hybrid_version"]) == (12, "4")
    assert "2 of its 4 full-attention layers" in card
    assert "- with a window in the base, as it had: 0, 3 (the latest 24 tokens, no sinks)" in card
    check = read_manifest(run / "export").check
    assert check.faults["a window of the base longer by one"] > check.tolerance
    assert "of the draft's tokens accepted" in printed


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("hybrid.layers=[0, 1]",), r"hybrid\.layers: layer 0 with a window in the base already.* name layers of \[1, 2, 4, 5\]"),
        (("hybrid.layers=[1, 2, 4, 5]",), r"hybrid\.layers: every layer would stream"),
        (
            ("hybrid.granularity=kv_head", "hybrid.streaming_kv_heads=[[], [0], [], [1], [], []]"),
            r"hybrid\.streaming_kv_heads: layer 3 with a window in the base already",
        ),
        (("hybrid.lazy_layer_ratio=0.05",), r"of 4 layers 0 would stream"),
        (
            ("hybrid.select=per_prompt", "hybrid.strategy=null", "train=null", "eval=[]"),
            r"hybrid\.select: per_prompt: 2 layers of this base have a window already",
        ),
        (
            ("model.rope_scaling={rope_type: yarn, factor: 2.0}",),
            r"model\.rope_scaling: yarn: olmo3 has rotary embeddings for each",
        ),
    ],
)
def test_what_such_a_base_cannot_do_is_refused_before_anything_runs(inputs, tmp_path, overrides, reason) -> None:
    clear = (
        ()
        if "layer_ratio" in overrides[0] or "select" in overrides[0] or "rope" in overrides[0]
        else (
            "hybrid.lazy_layer_ratio=null",
            "hybrid.strategy=null",
        )
    )
    with pytest.raises(UserError, match=reason):
        run_in_folder(recipe_on_base(inputs, *clear, *overrides), tmp_path)
