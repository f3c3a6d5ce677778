"""A shape in place of a model: random weights on the device, nothing downloaded, no tokenizer needed."""

import pytest
import torch
from rich.console import Console

from lt_train.bench.base import SHAPES, RandomBase, hybrid_spec, of_full_layers
from lt_train.bench.batching import bench_batching
from lt_train.bench.decode import bench_decode
from lt_train.bench.growth import bench_growth
from lt_train.bench.lazy_ratio import bench_lazy_ratio
from lt_train.bench.prefill import bench_prefill
from lt_train.bench.training_step import compare_steps, step_recipe
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from tests.support.families import BASES

PUBLISHED_PARAMETERS = {
    "135m": 134_515_008,
    "0.5b": 494_032_768,
    "1.5b": 1_543_714_304,
    "8b": 8_190_735_360,
    "32b": 32_763_876_352,
}
"""As the hub counts them in the weights of each source."""

COMMANDS = {
    "decode": ("--at", 300, "--lazy-layer-ratio", 0.5, "--kv-budget", 1),
    "growth": ("--at", 64),
    "batching": ("--answers", 3, "--longest", 32, "--kv-budget", 1),
    "training-step": ("--tokens", 40, "--runs", 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_the_published_model(name):
    config = SHAPES[name].as_config()
    with torch.device("meta"):
        model = build_hybrid(config, HybridSpec(config.num_hidden_layers, (), 4, 1020))
    assert model.num_parameters() == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_alone_is_measured_without_weights_and_without_a_tokenizer(command, lt_train, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    BASES["qwen3"].save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = lt_train("bench", command, "--shape", tmp_path / "config.json", *COMMANDS[command], "--w-recent", 30)
    assert code == 0, err
    assert "random weights" in out and sorted(tmp_path.iterdir()) == before


def test_weights_are_made_in_the_compute_dtype_and_the_two_models_of_a_training_step_have_the_same():
    base = RandomBase("tiny", BASES["qwen2"], dtype="bf16")
    assert base.for_inference(HybridSpec(4, (0,), 2, 30)).dtype == torch.bfloat16
    stock, hybrid = base.for_training(HybridSpec(4, (0,), 2, 30), torch.float32)
    assert all(torch.equal(x, hybrid.state_dict()[name]) for name, x in stock.state_dict().items())


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_shape_is_refused_with_the_names(command, lt_train):
    code, out, err = lt_train("bench", command, "--shape", "7b")
    assert code == 2 and "Traceback" not in out + err
    assert "--shape: 7b: no such shape" in err and "0.5b, 1.5b, 8b, 32b" in err


@pytest.mark.parametrize(("given", "problem"), [((), "neither is given"), (("base", "--shape", "8b"), "both are given")])
def test_either_a_model_or_a_shape_is_measured(given, problem, lt_train):
    code, _, err = lt_train("bench", "growth", *given)
    assert code == 2 and problem in err


def test_a_config_that_cannot_become_a_hybrid_is_refused(lt_train, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, out, err = lt_train("bench", "growth", "--shape", tmp_path)
    assert code == 2 and "no hybrid class" in err and "Traceback" not in out + err


def test_of_a_base_with_sliding_layers_the_full_ones_alone_are_counted_and_stream():
    config = BASES["olmo3"]  # layer 0 slides, three are full
    spec = hybrid_spec(config, 0.67, 2, 30)
    assert (spec.sliding_layers, spec.lazy_layers, of_full_layers(spec)) == ((0,), (1, 2), "2 of 3 full layers")
    assert not hybrid_spec(config, 0, 2, 30).streams
    assert of_full_layers(hybrid_spec(BASES["qwen3"], 0.5, 2, 30)) == "2 of 4 layers"
    with pytest.raises(UserError, match="of 3 layers 3 would stream"):
        hybrid_spec(config, 0.99, 2, 30)


@pytest.mark.parametrize("family", ["olmo3", "gpt_oss"])
def test_every_bench_of_a_model_runs_on_a_base_with_sliding_layers(family):
    base, console = RandomBase("tiny", BASES[family], "fp32"), Console(record=True, width=160)
    before = BASES[family].to_dict()
    bench_growth(base, 0.67, 2, 30, [64], console)
    bench_decode(base, [0.67], 2, 30, [100], 2**22, console)
    bench_prefill(base, [0.67], 2, 30, [100], 64, console)
    bench_lazy_ratio(base, [64], 8, 2, 30, 1, console)
    bench_batching(base, 0.67, 2, 30, 4, 80, 2**22, console)
    recipe = step_recipe("tiny", "lora", 0.67, 2, 30, 48, checkpointing=False, dtype="fp32")
    assert compare_steps(base, recipe, runs=1).hybrid > 0
    assert BASES[family].to_dict() == before
    printed = console.export_text()
    assert printed.count("2 of 3 full layers stream") == 2 and printed.count("2/3") == 2
    assert next(line for line in printed.splitlines() if line.split()[:1] == ["64"]).split()[-1] == "32", "the ring of what streams"
