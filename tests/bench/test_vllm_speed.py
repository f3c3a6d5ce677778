"""vLLM's decoding speed, where LT_TRAIN_VLLM_PYTHON names the python of an environment that has it."""

import os
from pathlib import Path

import pytest

from lt_train.bench.base import StoredBase
from lt_train.bench.vllm_speed import vllm_steps
from lt_train.recipe.schema import Model
from tests.support.repository import REPOSITORY

MIB = 2**20


@pytest.mark.slow
def test_vllm_decodes_the_base_with_as_many_sequences_and_as_long() -> None:
    python = os.environ.get("LT_TRAIN_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM needs an environment of its own: set LT_TRAIN_VLLM_PYTHON to its python (launch/serve-vllm.sh says how)")
    base = StoredBase(Model(base=str(REPOSITORY / "data/tiny-reasoner"), dtype="fp32"))
    found = vllm_steps(base, Path(python), {40: 3, 300: 40}, 16 * MIB, vocab_size=50)
    assert list(found) == [40, 300] and all(0 < step.milliseconds < 60_000 for step in found.values())
    assert found[40].slots == 3 and 0 < found[300].slots < 40  # as many as its blocks hold
