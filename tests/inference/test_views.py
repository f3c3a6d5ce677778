"""A step of the engine attends as the visibility predicate says, and as exactly in bf16 as scaled_dot_product_attention."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import KVStore
from lt_train.inference.views import LaterChunkView, StepView

SPEC = HybridSpec.from_streaming_heads([(), (0, 1, 2), (0, 2)], kv_heads=3, w_sink=3, w_recent=60)
LENGTHS = (5, 300, 128)
HEADS, GROUPS, SIZE, SCALING = 6, 3, 32, 32**-0.5


def empty_store(spec, dtype, slots=1):
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=HEADS * SIZE,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
    )
    return KVStore(build_hybrid(config, spec).to(dtype), slots=slots, pages=8)


def filled_store(dtype, keys, values):
    """Sequences of LENGTHS in the slots 0, 1, 2: their keys and values but for the last token's."""
    store = empty_store(SPEC, dtype, slots=3)
    for slot, length in enumerate(LENGTHS):
        store.admit(length)
        for layer in range(3):
            store.write(layer, slot, keys[slot][:, :-1], values[slot][:, :-1], 0)
        store.lengths[slot] = length - 1
    return store


def attended(dtype, keys, values, q_BH1D, layer):
    newest = [torch.stack([x[:, -1:] for x in sequences]) for sequences in (keys, values)]
    store = filled_store(dtype, keys, values)
    return StepView.after(store, store.lengths, 1, False).attend(SimpleNamespace(layer_idx=layer), q_BH1D, *newest, SCALING, 0.0)


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
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.bfloat16, 3.0), (torch.float16, 3.0)])
def test_a_step_in_half_precision_is_as_near_to_fp64_as_sdpa(layer, dtype, size):
    """Scores up to 4, up to 40."""
    keys, values, q_BH1D = drawn(dtype, size)
    exact = by_sdpa([x.double() for x in keys], [x.double() for x in values], q_BH1D.double(), layer)

    def error(out):
        return float((out.double() - exact).norm() / exact.norm())

    found = attended(dtype, keys, values, q_BH1D, layer)
    assert found.dtype == dtype
    assert error(found) <= 1.05 * error(by_sdpa(keys, values, q_BH1D, layer))


@torch.inference_mode()
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["pages", "ring", "both"])
def test_a_step_in_fp64_sees_what_the_predicate_says(layer):
    keys, values, q_BH1D = drawn(torch.float64, 1.0)
    torch.testing.assert_close(attended(torch.float64, keys, values, q_BH1D, layer), by_sdpa(keys, values, q_BH1D, layer))


LEARNED = HybridSpec(3, (1, 2), w_sink=0, w_recent=60, learned_sinks=True)
CHUNKS = (0, 50, 64, 190, 300)
"""Where chunks of a prompt begin: within the window, at its end, and after the ring has come round."""


@torch.inference_mode()
@pytest.mark.parametrize("in_parts", [True, False], ids=["parts", "mask"])
@pytest.mark.parametrize("spec", [SPEC, LEARNED], ids=["token sinks", "learned sinks"])
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["pages", "ring", "both"])
def test_a_later_chunk_sees_what_the_predicate_says(layer, spec, in_parts, monkeypatch):
    """In parts as on a CPU, by a mask as on a GPU."""
    monkeypatch.setattr("lt_train.inference.views.attends_in_parts", lambda device: in_parts)
    rng, length = torch.Generator().manual_seed(1), CHUNKS[-1]
    q_HTD = torch.randn(HEADS, length, SIZE, generator=rng, dtype=torch.float64)
    k_GTD, v_GTD = torch.randn(2, GROUPS, length, SIZE, generator=rng, dtype=torch.float64)
    sinks_H = torch.randn(HEADS, generator=rng, dtype=torch.float64) if spec.learned_sinks else torch.full((HEADS,), float("-inf"))
    streaming = spec.streaming_heads(GROUPS)[layer]
    of_group = torch.arange(HEADS).unflatten(0, (GROUPS, -1))
    module = SimpleNamespace(layer_idx=layer, sinks=lambda q_1RTD: sinks_H[of_group[list(streaming)].flatten()])
    store = empty_store(spec, torch.float64)
    slot = store.admit(length)
    store.write(layer, slot, k_GTD[:, : CHUNKS[1]], v_GTD[:, : CHUNKS[1]], 0)
    position_T = torch.arange(length)
    for before, after in pairwise(CHUNKS[1:]):
        store.lengths[slot] = before
        new = [x[None, :, before:after] for x in (q_HTD, k_GTD, v_GTD)]
        found_THD = LaterChunkView(store, slot, after - before).attend(module, *new, SCALING, 0.0)[0]
        for head in range(HEADS):
            streams = head // 2 in streaming
            window = spec.w_recent if streams else length
            visible_TK = streaming_visible(position_T[before:after, None], position_T, spec.w_sink, window)
            scores_TK = (q_HTD[head, before:after] @ k_GTD[head // 2].T * SCALING).masked_fill(~visible_TK, float("-inf"))
            sink_T1 = (sinks_H[head] if streams else torch.tensor(float("-inf"))).expand(after - before, 1)
            weights_TK = torch.cat([scores_TK, sink_T1], dim=1).softmax(1)[:, :-1]
            torch.testing.assert_close(found_THD[:, head], weights_TK @ v_GTD[head // 2])
