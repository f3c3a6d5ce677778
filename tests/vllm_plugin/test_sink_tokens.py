"""Sink tokens in vLLM's own environment, whose python LT_TRAIN_VLLM_PYTHON names: kernels and block bookkeeping."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPTS = REPOSITORY / "tests/support/in_vllm"


def printed(*command: Path | str) -> list[float]:
    """The numbers of a script's last line."""
    python = os.environ.get("LT_TRAIN_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM needs an environment of its own: set LT_TRAIN_VLLM_PYTHON to its python (launch/serve-vllm.sh says how)")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([python, *command], env=environment, cwd=SCRIPTS, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    return [float(number) for number in ran.stdout.splitlines()[-1].split()]


MODEL = REPOSITORY / "data/tiny-reasoner"


def test_on_a_cpu_a_query_attends_to_what_the_mask_says_it_sees() -> None:
    cases, difference = printed("sink_kernels.py", "cpu", MODEL)
    assert cases == 18 and difference < 1e-5


def test_for_a_gpu_vllms_triton_kernel_with_our_settings_attends_to_the_same() -> None:
    """In Triton's interpreter."""
    cases, difference = printed("in_interpreter.py", "sink_kernels.py", "gpu", MODEL)
    assert cases == 4 and difference < 1e-5


def test_every_query_finds_its_sinks_and_its_window_in_the_cache_whatever_is_freed_evicted_or_shared() -> None:
    tokens_from_cached_prefixes, preempted = printed("sink_blocks.py")
    assert tokens_from_cached_prefixes > 1000 and preempted > 100
