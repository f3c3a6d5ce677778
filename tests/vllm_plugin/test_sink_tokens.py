"""Sink tokens in vLLM's own environment, whose python LT_TRAIN_VLLM_PYTHON names: kernels and block bookkeeping."""

import pytest

from tests.support.vllm_python import MODEL, printed

pytestmark = pytest.mark.slow


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
