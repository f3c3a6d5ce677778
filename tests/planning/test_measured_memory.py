"""The plan's peak against that of real trainings, in a process of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lt_train.planning.memory import Phase, training_memory
from lt_train.planning.setup import Machine, setup_of
from lt_train.planning.shape import model_shape
from lt_train.runtime.units import GIB
from tests.support.measured_training import config_of, measure, recipe_of
from tests.support.processes import exit_code, start

WITHIN = 0.2

RUNS = {
    "mostly weights and their states": {
        "config": {
            "vocab_size": 4096,
            "hidden_size": 384,
            "intermediate_size": 1152,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 64}},
    },
    "mostly activations, gradients accumulated": {
        "config": {
            "vocab_size": 512,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 1536}, "train": {"batch_size": 2}},
    },
    "LoRA with gradient checkpointing, mostly the head": {
        "config": {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 1024}, "train": {"method": "lora", "gradient_checkpointing": True}, "lora": {}},
    },
}

QWEN3_1_7B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
QWEN3_0_6B = {**QWEN3_1_7B, "hidden_size": 1024, "intermediate_size": 3072}
LORA = {"train": {"method": "lora", "gradient_checkpointing": True}, "lora": {}}
ON_GPU = {
    "LoRA of 1.7 B, 16K tokens, gradient checkpointing": {
        "config": QWEN3_1_7B,
        "recipe": {"model": {"dtype": "bf16"}, "data": {"max_length": 16384}, **LORA},
    },
    "LoRA of 0.6 B, 4K tokens": {
        "config": QWEN3_0_6B,
        "recipe": {
            "model": {"dtype": "bf16"},
            "data": {"max_length": 4096},
            "train": {"method": "lora", "gradient_checkpointing": False},
            "lora": {},
        },
    },
    "all of 0.6 B, two rows of 4K tokens packed": {
        "config": QWEN3_0_6B,
        "recipe": {
            "model": {"dtype": "bf16"},
            "data": {"max_length": 4096, "packing": True},
            "train": {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": True},
        },
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The peak of each run in bytes: one process measures them all."""
    return peaks(tmp_path_factory.mktemp("measured"), RUNS)


@pytest.fixture(scope="module")
def measured_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return peaks(tmp_path_factory.mktemp("measured"), ON_GPU)


def peaks(folder: Path, runs: dict[str, Any]) -> dict[str, int]:
    output = folder / "output.txt"
    assert exit_code(start(measure, folder, runs, output=output)) == 0, output.read_text()[-2000:]
    return json.loads((folder / "peaks.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_the_peak_of_a_real_training_is_that_of_its_plan(kind: str, measured: dict[str, int]) -> None:
    assert_planned(kind, RUNS[kind], Machine(1, 16 * GIB, cpu=True), measured[kind])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ON_GPU)
def test_the_peak_of_a_training_on_a_gpu_is_that_of_its_plan(kind: str, measured_on_gpu: dict[str, int]) -> None:
    assert_planned(kind, ON_GPU[kind], Machine(1, 80 * GIB), measured_on_gpu[kind])


def assert_planned(kind: str, run: dict[str, Any], machine: Machine, measured: int) -> None:
    config = config_of(run["config"])
    recipe = recipe_of(run["recipe"], config.num_hidden_layers)
    shape = model_shape(recipe, config)
    setup = setup_of(recipe, recipe.train, machine, len(shape.spec.lazy_layers))
    memory = training_memory(shape, setup)
    print(f"{kind}: plan {memory.peak / 2**20:.0f} MiB ({memory.phase.name}), measured {measured / 2**20:.0f} MiB")
    assert memory.peak == pytest.approx(measured, rel=WITHIN), {phase.name: memory.at(phase) for phase in Phase}
