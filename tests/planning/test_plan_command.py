import json
import sys

import pytest

from lt_train import cli
from lt_train.planning.table import _operations
from tests.support.public_models import CONFIGS

QWEN = f"model.base={CONFIGS / 'qwen2.5-32b-instruct'}"


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run `lt-train plan`; returns exit code and all that it said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lt-train", "plan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return stop.value.code or 0, out + err

    return run


def test_a_plan_needs_a_config_alone_and_reports_all_that_was_requested(plan):
    code, said = plan("recipes/qwq-32b.yaml", "--set", f"model.base={CONFIGS / 'qwq-32b'}", "--gpus", 8, "--mean-tokens", 6000)
    assert code == 0
    for name in (
        "32,763,876,352 parameters",
        "weights",
        "profile",
        "gradients",
        "optimizer",
        "activations",
        "logits chunk",
        "KV cache",
    ):
        assert name in said
    for figure in (
        "launch/zero2.json",
        "optimizer steps",
        "operations",
        "TFLOP/s, one GPU at a time",
        "TFLOP/s per GPU",
        "from data.limit and --mean-tokens",
        "fits:",
    ):
        assert figure in said


KEYS = {
    "": ["name", "works", "machine", "model", "training", "profile", "kv_cache"],
    "machine": ["gpus", "cpu", "memory_bytes", "usable_bytes", "tflops", "efficiency"],
    "model": [
        *("base", "parameters", "active_parameters", "layers", "streaming_layers", "kv_heads", "streaming_kv_heads"),
        *("w_sink", "w_recent", "sliding_layers", "sliding_window", "learned_sinks"),
    ],
    "training": [
        *("fits", "trained_parameters", "dtype", "sharding", "micro_batch_size", "row_tokens", "sequence_parallel"),
        *("accumulation_steps", "undivided", "peak_bytes", "peak_phase", "host_bytes", "allocations", "options", "suggestions"),
        *("samples", "tokens", "epochs", "optimizer_steps", "flop", "hours"),
    ],
    "profile": [
        *("fits", "gpus", "peak_bytes", "weights_bytes", "hidden_states_bytes", "workspace_bytes", "sample_tokens"),
        *("hours", "most_hours", "suggestions"),
    ],
    "kv_cache": [
        *("evaluation", "sequence_tokens", "hybrid_bytes", "full_bytes", "hybrid_sequences", "full_sequences"),
        "vllm_sequences_by_streaming_layers",
    ],
}
"""The keys of `plan --json`, which programs rely on."""


def test_a_plan_as_json_has_stable_keys_and_the_numbers_of_the_table(plan):
    base = f"model.base={CONFIGS / 'qwq-32b'}"
    code, said = plan("recipes/qwq-32b.yaml", "--set", base, "--gpus", 8, "--mean-tokens", 6000, "--json")
    found = json.loads(said)
    assert code == 0 and found["works"] and found["training"]["fits"] and found["profile"]["fits"]
    assert {part: list(found[part] if part else found) for part in KEYS} == KEYS
    training = found["training"]
    assert found["model"]["parameters"] == 32_763_876_352
    assert training["peak_bytes"] == sum(each["bytes"] for each in training["allocations"] if each["at_peak"])
    assert training["peak_bytes"] <= found["machine"]["usable_bytes"] and "launch/zero2.json" in [
        option["deepspeed"] for option in training["options"]
    ]
    assert training["hours"] > 0 and training["tokens"] > training["optimizer_steps"] > 0 and training["suggestions"] == []
    assert found["kv_cache"]["hybrid_bytes"] < found["kv_cache"]["full_bytes"]


def test_a_plan_of_kv_heads_counts_them_and_reports_what_is_a_bound(plan):
    heads = ("hybrid.granularity=kv_head", "hybrid.strategy=gates", "hybrid.lazy_layer_ratio=0.875")
    base = f"model.base={CONFIGS / 'qwq-32b'}"
    by_head = ("recipes/qwq-32b.yaml", "--set", base, "--gpus", 8, "--mean-tokens", 6000, *(f"--set={each}" for each in heads))
    by_layer = [*by_head[:-3], "--set=hybrid.lazy_layer_ratio=0.875"]
    code, said = plan(*by_head)
    assert code == 0 and "; 448 of 512 KV heads stream (4 sinks, window 1,020)" in said
    assert "at most 64 layers have some of them; adapters and activations are counted for all" in said
    heads, layers = (json.loads(plan(*arguments, "--json")[1]) for arguments in (by_head, by_layer))
    assert (heads["model"]["kv_heads"], heads["model"]["streaming_kv_heads"], heads["model"]["streaming_layers"]) == (512, 448, 64)
    assert (layers["model"]["streaming_kv_heads"], layers["model"]["streaming_layers"]) == (448, 56)
    assert heads["kv_cache"]["hybrid_bytes"] == layers["kv_cache"]["hybrid_bytes"]
    assert heads["training"]["flop"] == pytest.approx(layers["training"]["flop"], rel=0.01)  # adapters in more layers
    assert heads["training"]["peak_bytes"] > layers["training"]["peak_bytes"]


def test_a_plan_as_json_that_does_not_fit_leaves_with_1_and_suggestions(plan):
    base = f"model.base={CONFIGS / 'qwq-32b'}"
    code, said = plan("recipes/qwq-32b.yaml", "--set", base, "--gpus", 8, "--gpu-memory", 24, "--mean-tokens", 6000, "--json")
    found = json.loads(said)
    assert (code, found["works"], found["training"]["fits"]) == (1, False, False)
    assert found["training"]["peak_bytes"] > found["machine"]["usable_bytes"]


def test_what_a_recipe_lacks_or_nobody_knows_is_null(plan):
    arguments = ("recipes/quickstart.yaml", "--gpus", 1, "--gpu-memory", 4, "--cpu", "--json", "--set=data.limit=200")
    nothing = ("train=null", "lora=null", "eval=[]", "hybrid.strategy=periodic", "hybrid.compare=[]")
    found = json.loads(plan(*arguments, *(f"--set={each}" for each in nothing))[1])
    assert (found["training"], found["profile"], found["kv_cache"]) == (None, None, None)
    found = json.loads(plan(*arguments)[1])
    assert found["training"]["hours"] is None and found["training"]["optimizer_steps"] == 60 and found["machine"]["cpu"]


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 FLOP"), (999.4, "999.4 FLOP"), (5.024e12, "5.024 TFLOP"), (1.725e19, "17.25 EFLOP")]
)
def test_operations_are_reported_with_the_prefix_of_their_size(count, said):
    assert _operations(count) == said


def test_what_does_not_fit_reports_what_would_and_leaves_with_1(plan):
    code, said = plan("recipes/qwq-still-32b.yaml", "--set", QWEN, "--gpus", 8, "--set", "train.sequence_parallel=1")
    assert code == 1
    assert "does not fit" in said and "each of these changes alone makes it fit" in said
    assert "--set train.sequence_parallel=4" in said and "12 GPUs of this size" in said


def test_a_scoring_of_layers_that_does_not_fit_is_reported_and_leaves_with_1(plan):
    lora = ("--set", "train.method=lora", "--set", "train.deepspeed=launch/zero3-offload.json")
    code, said = plan("recipes/qwq-32b.yaml", "--set", f"model.base={CONFIGS / 'qwq-32b'}", "--gpus", 1, *lora)
    assert code == 1
    assert "fits: " in said  # the training
    assert "scoring the layers does not fit" in said
    for way in ("--set hybrid.calibration.max_length=", "lt-train profile", "hybrid.layers", "2 GPUs of this size in one machine"):
        assert way in said


def test_a_batch_that_cannot_be_shared_out_is_reported_with_the_nearest_that_can(plan):
    code, said = plan("recipes/qwq-32b.yaml", "--set", f"model.base={CONFIGS / 'qwq-32b'}", "--gpus", 7)
    assert code == 1
    assert "the batch cannot be divided" in said and "28 or 35" in said


def test_a_cpu_run_is_planned_from_the_data_at_hand(plan):
    code, said = plan("recipes/quickstart.yaml", "--cpu", "--gpus", 1, "--gpu-memory", 8, "--set", "data.limit=200")
    assert code == 0
    assert "counted in data/ledger/train.jsonl" in said and "fp32" in said and "TFLOP/s" not in said


def test_unknown_tokens_are_reported_as_unknown(plan):
    _, said = plan("recipes/qwq-still-32b.yaml", "--set", QWEN)
    assert "unknown: the data are not local. Fix: give --samples" in said


def test_a_recipe_without_training_has_a_plan_too(plan):
    no_training = ("--set", "train=null", "--set", "lora=null", "--set", "eval.0.variants=[converted]")
    code, said = plan("recipes/quickstart.yaml", *no_training)
    assert (code, "nothing is trained" in said, "KV cache" in said) == (0, True, True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpus", 0], "--gpus: 0: not above 0"),
        (["--gpu-memory", -1], "--gpu-memory: -1: not above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory: nan: not above 0"),
        (["--gpu-memory", "inf"], "--gpu-memory: inf: not above 0 and at most 1,000,000"),
        (["--samples", 10**25], "more than 100,000,000"),
        (["--efficiency", 1.5], "--efficiency: 1.5"),
        (["--tflops", 0], "--tflops: 0"),
        (["--samples", 0], "--samples: 0"),
        (["--set", "data.max_length=40000"], "more than the model's context"),
        (["--set", "hybrid.lazy_layer_ratio=0.001"], "no layer"),
        (["--set", "train.sequence_parallel=3"], "train.sequence_parallel: 3: 40 query heads"),
    ],
)
def test_bad_figures_leave_with_2_and_a_reason(plan, arguments, reason):
    code, said = plan("recipes/qwq-still-32b.yaml", "--set", QWEN, *arguments)
    assert code == 2
    assert reason in said


def test_no_config_and_an_unknown_architecture_leave_with_2_and_a_reason(plan, tmp_path):
    code, said = plan("recipes/qwq-still-32b.yaml", "--set", f"model.base={tmp_path}")
    assert (code, "there is no" in said and "config.json" in said) == (2, True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    code, said = plan("recipes/qwq-still-32b.yaml", "--set", f"model.base={tmp_path}")
    assert (code, "no hybrid class" in said) == (2, True)
    code, said = plan("recipes/qwq-still-32b.yaml", "--set", "model.base=nobody/has-this")
    assert (code, "config cannot be loaded" in said) == (2, True)
