"""Hybrids of bases in which some layers have a window from the start: those stay as they are, and only full layers stream."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MinistralConfig, Olmo3Config, Qwen2Config

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.loading import build_hybrid, hybrid_config, hybrid_of, load_hybrid
from lt_train.hybrid.sequence_parallel import Shards
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.families import SIZES

TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
WINDOW = 9
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
}
BASES = {
    "olmo3": Olmo3Config(**SIZES, layer_types=TYPES, sliding_window=WINDOW, rope_parameters=ROPE),
    "ministral": MinistralConfig(**SIZES, head_dim=16, layer_types=TYPES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, layer_types=TYPES, sliding_window=WINDOW, use_sliding_window=True),
}
IDS = torch.randint(2, 96, (2, 60), generator=torch.Generator().manual_seed(0))


def spec_of(base, *, w_recent=5, w_sink=2, **streaming):
    return replace(base_spec(base.to_dict(), w_sink, w_recent), **streaming)


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def dense_masks(spec, kv_heads=2, query_heads=4):
    """By layer, the mask [1, H, T, T] of what its heads see, written down without any code of the hybrids."""
    query, key = torch.arange(IDS.shape[1])[:, None], torch.arange(IDS.shape[1])[None]
    full = key <= query
    sliding = full & (query - key < WINDOW)
    streaming = full & ((key < spec.w_sink) | (query - key < spec.w_recent))
    for layer, heads in enumerate(spec.streaming_heads(kv_heads)):
        others = sliding if TYPES[layer] == "sliding_attention" else full
        masks = torch.stack([streaming if head in heads else others for head in range(kv_heads)])
        yield masks.repeat_interleave(query_heads // kv_heads, dim=0)[None]


@pytest.mark.parametrize("streaming", [{"lazy_layers": (1,)}, {"lazy_layers": (1, 2)}, {"split_layers": ((2, (0,)),)}])
@torch.no_grad()
def test_it_is_the_base_with_other_masks_in_the_layers_that_stream_and_keeps_their_rotary_embedding(base, streaming):
    spec = spec_of(base, **streaming)
    stock, hybrid = AutoModelForCausalLM.from_config(base).eval(), build_hybrid(base, spec).eval()
    hybrid.load_state_dict(stock.state_dict())
    unchanged = stock(IDS).logits
    with hybrid.full_attention():
        torch.testing.assert_close(hybrid(IDS, use_cache=False).logits, unchanged, atol=1e-5, rtol=1e-5)
    for layer, mask in zip(stock.model.layers, dense_masks(spec), strict=True):
        layer.register_forward_pre_hook(
            lambda _, args, given, mask=mask: (args, given | {"attention_mask": mask}), with_kwargs=True
        )
    found = hybrid(IDS, use_cache=False).logits
    torch.testing.assert_close(found, stock(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (found - unchanged).abs().max() > 1e-3


@torch.no_grad()
def test_cached_tokens_in_chunks_have_the_logits_of_one_pass(base):
    model = build_hybrid(base, spec_of(base, lazy_layers=(1,))).eval()
    cache, parts = HybridCache(model.spec), []
    for part in IDS.split([20, 7, *[1] * 33], dim=1):
        parts.append(model(part, **{CACHE_ARGUMENT: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW, 7, 60, WINDOW]
    assert model.spec.cached_tokens(60, kv_heads=2) == 2 * (WINDOW + 7 + 60 + WINDOW)


def test_the_config_keeps_the_types_and_window_of_the_base_and_records_what_streams_beside_them(base, tmp_path):
    spec = spec_of(base, lazy_layers=(1,), split_layers=((2, (1,)),))
    config = hybrid_config(base, spec)
    assert (config.layer_types, config.sliding_window) == (TYPES, WINDOW)
    assert (config.w_recent, config.streaming_kv_heads, config.hybrid_version) == (5, [[], [0, 1], [1], []], "4")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.spec == spec and base_spec(again.to_dict(), 2, 5) == spec.all_full == spec_of(base)
    assert hybrid_config(again, spec_of(base, lazy_layers=(2,))).spec.lazy_layers == (2,)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lazy_layers": (0, 1)}, r"lazy_layers: \[0\]: they see 9 tokens in the base already.* Fix: name layers of \[1, 2\]"),
        ({"split_layers": ((3, (0,)),)}, r"lazy_layers: \[3\]: they see 9 tokens"),
        ({"sliding_layers": (0, 4)}, r"sliding_layers: \[0, 4\]: not layers of the model"),
        ({"sliding_window": 0}, "sliding_window: 0: with 2 sliding layers"),
    ],
)
def test_a_sliding_layer_cannot_stream_and_sizes_must_fit(changed, reason):
    with pytest.raises(HybridError, match=reason):
        spec_of(BASES["olmo3"], **changed)


@pytest.mark.parametrize("changed", [{"sliding_layers": (), "sliding_window": 0}, {"sliding_layers": (0,)}, {"sliding_window": 8}])
def test_a_spec_of_other_sliding_layers_than_the_bases_is_refused(base, changed):
    with pytest.raises(HybridError, match=r"in the base layers \[0, 3\] see 9 tokens from the start"):
        hybrid_config(base, spec_of(base, **changed))


def test_a_config_whose_fields_contradict_each_other_is_refused(base):
    values = hybrid_config(base, spec_of(base, lazy_layers=(1,)))
    for changed in ({"hybrid_version": "3"}, {"streaming_kv_heads": None}, {"layer_types": ["full_attention"] * 4}):
        with pytest.raises(HybridError):
            type(values)(**values.to_dict() | changed)


@torch.no_grad()
def test_a_model_in_memory_becomes_a_hybrid_with_its_rotary_embeddings(base):
    stock = AutoModelForCausalLM.from_config(base).eval()
    hybrid = hybrid_of(stock, spec_of(base, lazy_layers=(2,)))
    with hybrid.full_attention():
        torch.testing.assert_close(hybrid(IDS, use_cache=False).logits, stock(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_weights_keep_the_frequencies_of_every_type_in_fp32(tmp_path):
    AutoModelForCausalLM.from_config(BASES["olmo3"]).save_pretrained(tmp_path)
    rotary = load_hybrid(tmp_path, spec_of(BASES["olmo3"]), dtype=torch.bfloat16).bfloat16().model.rotary_emb
    assert {buffer.dtype for buffer in rotary.buffers()} == {torch.float32} and len(list(rotary.buffers())) == 4


def test_learned_sinks_are_those_of_streaming_layers_alone(base):
    model = build_hybrid(base, spec_of(base, w_sink=0, lazy_layers=(1,), learned_sinks=True))
    assert [hasattr(layer.self_attn, "sinks") for layer in model.model.layers] == [False, True, False, False]
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert model.model.layers[1].self_attn.sinks.weight.grad.abs().max() > 0


def test_a_process_of_a_sharded_sequence_has_the_sliding_layers_of_the_whole():
    spec = spec_of(BASES["olmo3"], lazy_layers=(1,), split_layers=((2, (1,)),))
    first, second = (Shards(lambda: None, index, 2).spec_of_process(spec, 2) for index in (0, 1))
    assert (first.lazy_layers, second.lazy_layers) == ((1,), (1, 2))
    assert {(each.sliding_layers, each.sliding_window) for each in (first, second)} == {((0, 3), WINDOW)}


def test_specs_without_sliding_layers_have_the_name_and_version_they_had():
    spec = HybridSpec(2, (1,), 4, 12)
    assert repr(spec) == "HybridSpec(num_layers=2, lazy_layers=(1,), w_sink=4, w_recent=12)" and spec.version == "1"
