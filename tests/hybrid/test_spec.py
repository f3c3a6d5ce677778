"""What a HybridSpec accepts, and how split layers are distinguished from those that stream as a whole."""

import pytest

from lt_train.hybrid.configuration import HybridQwen3Config
from lt_train.hybrid.spec import HybridError, HybridSpec

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12}
HEADS = [[], [1], [0, 1]]


def test_a_spec_and_its_kv_heads_are_two_forms_of_the_same():
    spec = HybridSpec.from_streaming_heads(HEADS, kv_heads=2, w_sink=4, w_recent=12)
    assert spec == HybridSpec(3, (2,), 4, 12, split_layers=((1, (1,)),))
    assert list(map(list, spec.streaming_heads(kv_heads=2))) == HEADS
    assert spec.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert spec.streams and not spec.all_full.streams


def test_a_spec_without_split_layers_is_named_as_before_there_were_any():
    assert repr(HybridSpec(2, (1,), 4, 12)) == "HybridSpec(num_layers=2, lazy_layers=(1,), w_sink=4, w_recent=12)"


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        (((1, (0,)), (1, (1,))), "a layer is named twice"),
        (((2, (0,)),), "a layer is named twice"),
        (((3, (0,)),), "not in the model"),
        (((1, ()),), "not one or more different heads"),
        (((1, (0, 0)),), "not one or more different heads"),
        (((1, (-1,)),), "not one or more different heads"),
    ],
)
def test_split_layers_that_are_none_are_refused(split, problem):
    with pytest.raises(HybridError, match=problem):
        HybridSpec(3, (2,), 4, 12, split_layers=split)


def test_a_head_that_the_layer_does_not_have_is_refused():
    with pytest.raises(HybridError, match=r"KV heads \[2\] of layer 0: not in the model"):
        HybridSpec.from_streaming_heads([[2]], kv_heads=2, w_sink=4, w_recent=12)


def test_a_head_named_twice_is_not_taken_for_two():
    with pytest.raises(HybridError, match=r"KV heads \[1, 1\] of layer 0: a head is named twice"):
        HybridSpec.from_streaming_heads([[1, 1]], kv_heads=2, w_sink=4, w_recent=12)


def test_layers_that_stream_wholly_or_in_part_are_those_that_training_changes():
    assert HybridSpec(4, (3,), split_layers=((1, (0,)),)).streaming_layers == (1, 3)


def test_a_config_keeps_the_kv_heads_that_stream():
    types = ["full_attention", "full_attention", "sliding_attention"]
    config = HybridQwen3Config(**SIZES, layer_types=types, streaming_kv_heads=HEADS, hybrid_version="3")
    assert list(map(list, config.spec.streaming_heads(kv_heads=2))) == HEADS
    assert HybridQwen3Config.from_dict(config.to_dict()).spec == config.spec


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"hybrid_version": "1"}, "hybrid_version: '1'"),
        ({"layer_types": ["full_attention"] * 3}, "streaming_kv_heads: they make 1 layers stream with all their heads"),
        ({"w_sink": 0, "learned_sinks": True}, "learned_sinks"),
        ({"streaming_kv_heads": [[], [5], [0, 1]]}, "not in the model"),
        ({"streaming_kv_heads": [[], [1]]}, "streaming_kv_heads"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changed, problem):
    types = ["full_attention", "full_attention", "sliding_attention"]
    given = SIZES | {"layer_types": types, "streaming_kv_heads": HEADS, "hybrid_version": "3"} | changed
    with pytest.raises(HybridError, match=problem):
        HybridQwen3Config(**given)
