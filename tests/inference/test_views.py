"""A step of the engine attends as the visibility predicate says, and as exactly in bf16 as scaled_dot_product_attention."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import KVStore
from lt_train.inference.views import StepView

SPEC = HybridSpec.from_streaming_heads([(), (0, 1, 2), (0, 2)], kv_heads=3, w_sink=3, w_recent=60)
LENGTHS = (5, 300, 128)
HEADS, GROUPS, SIZE, SCALING = 6, 3, 32, 32**-0.5


def filled_store(dtype, keys, values):
    """Sequences of LENGTHS in the slots 0, 1, 2: their keys and values but for the last token's."""
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=HEADS * SIZE,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
    )
    store = KVStore(build_hybrid(config, SPEC).to(dtype), slots=3, pages=8)
    for slot, length in enumerate(LENGTHS):
        store.admit(length)
        for layer in range(3):
            store.write(layer, slot, keys[slot][:, :-1], values[slot][:, :-1], 0)
        store.lengths[slot] = length - 1
    return store


def attended(dtype, keys, values, q_BH1D, layer):
    newest = [torch.stack([x[:, -1:] for x in sequences]) for sequences in (keys, values)]
    return StepView(filled_store(dtype, keys, values)).attend(SimpleNamespace(layer_idx=layer), q_BH1D, *newest, SCALING, 0.0)


def by_sdpa(keys, values, q_BH1D, layer):
    outputs = []
    for q_H1D, k_GTD, v_GTD in zip(q_BH1D, keys, values, strict=True):
        position_T = torch.arange(k_GTD.shape[1])
        windows_H = [SPEC.w_recent if h // 2 in SPEC.streaming_heads(GROUPS)[layer] else len(position_T) for h in range(HEADS)]
        visible_H1T = torch.stack([streaming_visible(position_T[-1:, None], position_T, SPEC.w_sink, w) for w in windows_H])
        outputs.append(
            scaled_dot_product_attention(
                q_H1D[None], k_GTD[None], v_GTD[None], attn_mask=visible_H1T, scale=SCALING, enable_gqa=True
            ).transpose(1, 2)[0]
        )
    return torch.stack(outputs)


def drawn(dtype, size):
    generator = torch.Generator().manual_seed(0)
    keys, values = ([torch.randn(GROUPS, length, SIZE, generator=generator) for length in LENGTHS] for _ in range(2))
    q_BH1D = torch.randn(len(LENGTHS), HEADS, 1, SIZE, generator=generator)
    return [size * x.to(dtype) for x in keys], [x.to(dtype) for x in values], size * q_BH1D.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["pages", "ring", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_as_near_to_fp64_as_sdpa(layer, dtype):
    for size in (1.0, 3.0):  # scores up to 4, up to 40
        keys, values, q_BH1D = drawn(dtype, size)
        exact = by_sdpa([x.double() for x in keys], [x.double() for x in values], q_BH1D.double(), layer)

        def error(out, exact=exact):
            return float((out.double() - exact).norm() / exact.norm())

        found = attended(dtype, keys, values, q_BH1D, layer)
        assert found.dtype == dtype
        assert error(found) <= 1.05 * error(by_sdpa(keys, values, q_BH1D, layer))


@torch.inference_mode()
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["pages", "ring", "both"])
def test_a_step_in_fp64_sees_what_the_predicate_says(layer):
    keys, values, q_BH1D = drawn(torch.float64, 1.0)
    torch.testing.assert_close(attended(torch.float64, keys, values, q_BH1D, layer), by_sdpa(keys, values, q_BH1D, layer))
