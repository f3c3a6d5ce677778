"""Layers of which some KV heads stream, against the base's own class with a mask of its own for each head."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config

from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.reference import masked_attention
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import FullView, SplitView, StreamingView
from tests.support.families import FAMILIES, SIZES, SPLIT, WITH_SINKS, base_of, on_base

PACKED = torch.cat([torch.arange(length) for length in (11, 2, 1, 5, 21)]).expand(2, -1)
"""Documents longer than sinks and window, as long as the window, and shorter than the sinks."""


def masked_heads(module, query, key, value, attention_mask, scaling, dropout=0.0, spec=None, position_ids=None, **kwargs):
    """Attention in which each KV head has its own dense mask: an attention function for transformers' stock classes."""
    kv_heads = key.shape[1]
    q_BT1, k_B1T = position_ids[:, :, None], position_ids[:, None, :]
    document_BT = (position_ids == 0).cumsum(1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    full_BTT = full_visible(q_BT1, k_B1T) & same_BTT
    streaming_BTT = streaming_visible(q_BT1, k_B1T, spec.w_sink, spec.w_recent) & same_BTT
    streaming = spec.streaming_heads(kv_heads)[module.layer_idx]
    sliding_BTT = streaming_visible(q_BT1, k_B1T, 0, max(spec.sliding_window, 1)) & same_BTT
    others_BTT = sliding_BTT if module.layer_idx in spec.sliding_layers else full_BTT
    outs = []
    for head, q_BRTD in enumerate(query.chunk(kv_heads, dim=1)):
        visible_BTT = streaming_BTT if head in streaming else others_BTT
        outs.append(masked_attention(q_BRTD, key[:, [head]], value[:, [head]], visible_BTT, scaling))
    return torch.cat(outs, dim=1).transpose(1, 2), None


AttentionInterface.register("masked_heads", masked_heads)


def logits_of_masked_heads(hybrid, base_config, spec, ids_BT, position_BT):
    stock = AutoModelForCausalLM.from_config(deepcopy(base_config), attn_implementation="masked_heads").eval()
    stock.load_state_dict(hybrid.state_dict())
    return stock(ids_BT, position_ids=position_BT, use_cache=False, spec=spec).logits


CASES = [("qwen3", 0, "blocked"), ("qwen3", 3, "reference"), ("olmo3", 0, "reference")]
CASES += [(family, 3, "blocked") for family in FAMILIES if family not in WITH_SINKS]


@pytest.mark.parametrize(("family", "w_sink", "kernel"), CASES)
@torch.no_grad()
def test_packed_documents_are_those_of_masking_each_head(family, w_sink, kernel):
    spec = on_base(base_of(family), replace(SPLIT, w_sink=w_sink))
    hybrid, ids_BT = build_hybrid(base_of(family), spec).eval(), torch.randint(2, 96, PACKED.shape)
    hybrid.set_attention_kernel(kernel)
    expected = logits_of_masked_heads(hybrid, base_of(family), spec, ids_BT, PACKED)
    found = hybrid(ids_BT, position_ids=PACKED, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    swapped = HybridSpec.from_streaming_heads([(0,), (), (1,), (0, 1)], 2, w_sink, w_recent=7)
    swapped = on_base(base_of(family), swapped)
    others = logits_of_masked_heads(hybrid, base_of(family), swapped, ids_BT, PACKED)
    assert (others - expected).abs().max() > 1e-3, "so other heads would be noticed"


def by_heads(heads, kv_heads=4):
    return HybridSpec.from_streaming_heads([heads, (), heads], kv_heads, w_sink=2, w_recent=5)


@pytest.mark.parametrize("heads", [(0,), (3,), (1, 2), (0, 2, 3)])
@pytest.mark.parametrize("query_heads", [4, 12])
@torch.no_grad()
def test_any_heads_of_a_layer_may_stream_with_one_or_several_query_heads_each(query_heads, heads):
    base = Qwen3Config(**SIZES | {"num_hidden_layers": 3, "num_attention_heads": query_heads, "num_key_value_heads": 4}, head_dim=8)
    hybrid, ids_BT = build_hybrid(base, by_heads(heads)).eval(), torch.randint(2, 96, PACKED.shape)
    expected = logits_of_masked_heads(hybrid, base, hybrid.spec, ids_BT, PACKED)
    torch.testing.assert_close(hybrid(ids_BT, position_ids=PACKED).logits, expected, atol=2e-5, rtol=2e-5)


def test_all_heads_of_a_layer_are_the_layer_and_with_one_head_there_is_nothing_to_split():
    assert by_heads((0, 1, 2, 3)) == HybridSpec(3, (0, 2), w_sink=2, w_recent=5)
    assert by_heads((0,), kv_heads=1) == HybridSpec(3, (0, 2), w_sink=2, w_recent=5)


def split_and_masked(dtype):
    """A split layer's attention, the same with a mask for each head, and their inputs."""
    documents = find_documents(*PACKED.shape, torch.device("cpu"), None, PACKED)
    spec = HybridSpec.from_streaming_heads([(1, 2)], 3, w_sink=3, w_recent=7)
    module = torch.nn.Module()
    module.layer_idx, module.is_causal, module.num_key_value_groups = 0, True, 2
    view = SplitView(FullView(documents), StreamingView(documents, spec), spec.split_heads(0))
    q, k, v = (torch.randn(2, heads, PACKED.shape[1], 8, dtype=torch.float64).to(dtype) for heads in (6, 3, 3))

    def masked(q, k, v):
        return masked_heads(module, q, k, v, None, 0.3, spec=spec, position_ids=PACKED)[0]

    return (lambda *qkv: view.attend(module, *qkv, 0.3, 0.0)), masked, (q, k, v)


@torch.no_grad()
def test_bf16_is_as_near_as_its_rounding():
    split, masked, qkv = split_and_masked(torch.bfloat16)
    found, exact = split(*qkv), masked(*(x.double() for x in qkv))
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 0.01


def test_gradients_are_those_of_masking_each_head():
    split, masked, qkv = split_and_masked(torch.float64)
    leaves = [x.requires_grad_() for x in qkv]
    weights = torch.randn(2, PACKED.shape[1], 6, 8, dtype=torch.float64)
    found, expected = (torch.autograd.grad((attend(*leaves) * weights).sum(), leaves) for attend in (split, masked))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
