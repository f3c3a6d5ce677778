"""The plan's peak against that of real trainings, in a process of their own."""

import json
import subprocess
import sys

import pytest

from lt_train.planning.memory import Phase, training_memory
from lt_train.planning.setup import Machine, setup_of
from lt_train.planning.shape import model_shape
from lt_train.runtime.units import GIB
from tests.support.measured_training import config_of, recipe_of
from tests.support.repository import ENVIRONMENT

WITHIN = 0.2

RUNS = {
    "mostly weights and their states": {
        "config": {
            "vocab_size": 4096,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 128}},
    },
    "mostly activations, gradients accumulated": {
        "config": {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 2048}, "train": {"batch_size": 2}},
    },
    "LoRA with gradient checkpointing, mostly the head": {
        "config": {
            "vocab_size": 8192,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        "recipe": {"data": {"max_length": 1536}, "train": {"method": "lora", "gradient_checkpointing": True}, "lora": {}},
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The peak of each run in bytes: one process measures them all."""
    # The C library gives freed tensors back at once only above these sizes, which grow by themselves unless they are set.
    environment = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    folder = tmp_path_factory.mktemp("measured")
    command = [sys.executable, "-m", "tests.support.measured_training", str(folder), json.dumps(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_the_peak_of_a_real_training_is_that_of_its_plan(kind: str, measured: dict[str, int]) -> None:
    config = config_of(RUNS[kind]["config"])
    recipe = recipe_of(RUNS[kind]["recipe"], config.num_hidden_layers)
    shape = model_shape(recipe, config)
    setup = setup_of(recipe, recipe.train, Machine(1, 16 * GIB, cpu=True), len(shape.spec.lazy_layers))
    memory = training_memory(shape, setup)
    print(f"{kind}: plan {memory.peak / 2**20:.0f} MiB ({memory.phase.name}), measured {measured[kind] / 2**20:.0f} MiB")
    assert memory.peak == pytest.approx(measured[kind], rel=WITHIN), {phase.name: memory.at(phase) for phase in Phase}
