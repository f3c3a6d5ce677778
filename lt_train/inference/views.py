"""What a layer's queries see while the engine runs: each view writes the new keys and values into the store, then attends.

Shapes as in store.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lt_train.hybrid.cache import slot_of, slot_positions
from lt_train.hybrid.learned_sinks import sdpa_with_sinks, sinks_of, softmax_with_sinks
from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.views import AttentionView
from lt_train.inference.kv_store import PAGE, KVStore, PagedLayer, PageMap, RingLayer


class StepView(AttentionView):
    """One new token for every running sequence: row b is the sequence in slot b."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.page_map = store.page_map()
        self.lengths = store.lengths
        self._on_device: dict[torch.device, StepIndices] = {}

    def attend(self, module, q_BH1D, k_BG1D, v_BG1D, scaling, dropout):
        layer = self.store.layers[module.layer_idx]
        indices = self._indices(layer.device)
        groups = k_BG1D.shape[1]
        q_BGRD = q_BH1D[:, :, 0].unflatten(1, (groups, -1))
        if isinstance(layer, RingLayer):
            sinks_H = sinks_of(module, self.store.spec, q_BH1D)
            sinks_GR = None if sinks_H is None else sinks_H.unflatten(0, (groups, -1))
            out_BGRD = self._ring(layer, indices, q_BGRD, k_BG1D[:, :, 0], v_BG1D[:, :, 0], scaling, sinks_GR)
        else:
            out_BGRD = self._paged(layer, indices, q_BGRD, k_BG1D[:, :, 0], v_BG1D[:, :, 0], scaling)
        return out_BGRD.flatten(1, 2)[:, None]

    def _ring(self, layer: RingLayer, indices, q_BGRD, k_BGD, v_BGD, scaling, sinks_GR):
        rows = q_BGRD.shape[0]
        layer.keys[indices.row_B, :, indices.place_B] = k_BGD
        layer.values[indices.row_B, :, indices.place_B] = v_BGD
        used = min(max(self.lengths) + 1, layer.keys.shape[2])
        k_BGWD, v_BGWD = layer.keys[:rows, :, :used], layer.values[:rows, :, :used]
        weights_BGRW = scaling * _product(q_BGRD, k_BGWD.transpose(-1, -2))
        if indices.empty_BW is not None:
            weights_BGRW = weights_BGRW.masked_fill(indices.empty_BW[:, None, None, :used], float("-inf"))
        return _product(softmax_with_sinks(weights_BGRW, sinks_GR), v_BGWD).to(q_BGRD.dtype)

    def _paged(self, layer: PagedLayer, indices, q_BGRD, k_BGD, v_BGD, scaling):
        pages = indices.pages
        layer.keys[pages.newest_B, :, pages.offset_B] = k_BGD
        layer.values[pages.newest_B, :, pages.offset_B] = v_BGD
        used = pages.owner_N.shape[0]
        return attend_pages(q_BGRD, layer.keys[:used], layer.values[:used], pages, scaling)

    def _indices(self, device: torch.device) -> "StepIndices":
        if device not in self._on_device:
            self._on_device[device] = StepIndices.of(self.store, self.page_map, device)
        return self._on_device[device]


def attend_pages(q_BGRD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, pages: "PageIndices", scaling: float) -> Tensor:
    """Every page meets the queries of its owner; the parts of one sequence are then joined as one softmax. Returns out_BGRD."""
    rows = q_BGRD.shape[0]
    q_NGRD = torch.cat([q_BGRD, q_BGRD.new_zeros(1, *q_BGRD.shape[1:])])[pages.owner_N]
    logits_NGRP = scaling * _product(q_NGRD, k_NGPD.transpose(-1, -2))
    logits_NGRP[pages.partial_M] = logits_NGRP[pages.partial_M].masked_fill(pages.empty_MP[:, None, None], float("-inf"))
    largest_NGR = logits_NGRP.amax(-1)
    shape = (rows + 1, *largest_NGR.shape[1:])
    owner_NGR = pages.owner_N[:, None, None].expand_as(largest_NGR)
    largest_BGR = largest_NGR.new_full(shape, float("-inf")).scatter_reduce(0, owner_NGR, largest_NGR, "amax")
    largest_BGR[rows] = 0  # nobody's pages: whatever is finite
    weights_NGRP = (logits_NGRP - largest_BGR[pages.owner_N].unsqueeze(-1)).exp_()
    total_BGR = largest_NGR.new_zeros(shape).index_add(0, pages.owner_N, weights_NGRP.sum(-1))
    part_NGRD = _product(weights_NGRP, v_NGPD)
    sum_BGRD = part_NGRD.new_zeros(*shape, part_NGRD.shape[-1]).index_add(0, pages.owner_N, part_NGRD)
    return (sum_BGRD[:rows] / total_BGR[:rows].unsqueeze(-1)).to(q_BGRD.dtype)


def _product(a_BGRK: Tensor, b_BGKC: Tensor) -> Tensor:
    """The matrix product in fp32 or better, with b in bf16 and fp16 too: rounded to those, large scores would shift the softmax."""
    if b_BGKC.dtype not in (torch.bfloat16, torch.float16):
        return a_BGRK @ b_BGKC
    if b_BGKC.is_cuda:
        product_NRC = torch.bmm(a_BGRK.flatten(0, 1).to(b_BGKC.dtype), b_BGKC.flatten(0, 1), out_dtype=torch.float32)
        return product_NRC.unflatten(0, a_BGRK.shape[:2])
    return a_BGRK.float() @ b_BGKC.float()


@dataclass
class PageIndices:
    """Where a step finds the pages of a layer, on one device. partial_M are the pages that are not full, empty_MP their places that
    hold no token yet."""

    owner_N: Tensor
    newest_B: Tensor
    offset_B: Tensor
    partial_M: Tensor
    empty_MP: Tensor

    @classmethod
    def of(cls, owner: list[int], filled: list[int], newest: list[int], offset: list[int], device: torch.device) -> "PageIndices":
        """owner, filled: by page, its slot and its cached tokens. newest, offset: by slot, the page and place of the new token."""
        filled_N = torch.tensor(filled, device=device)
        partial_M = (filled_N < PAGE).nonzero()[:, 0]
        return cls(
            owner_N=torch.tensor(owner, device=device),
            newest_B=torch.tensor(newest, device=device),
            offset_B=torch.tensor(offset, device=device),
            partial_M=partial_M,
            empty_MP=torch.arange(PAGE, device=device) >= filled_N[partial_M, None],
        )


@dataclass
class StepIndices:
    """Where a step finds its cached tokens, on one device; all layers share it. empty_BW are the places of rings that hold no token
    yet, None where all are full."""

    row_B: Tensor
    place_B: Tensor
    empty_BW: Tensor | None
    pages: PageIndices

    @classmethod
    def of(cls, store: KVStore, pages: PageMap, device: torch.device) -> "StepIndices":
        spec = store.spec
        length_B = torch.tensor(store.lengths, device=device)
        empty_BW = None
        if min(store.lengths) + 1 < min(max(store.lengths) + 1, spec.window):
            empty_BW = torch.arange(spec.window, device=device) > length_B[:, None]
        offset = [length % PAGE for length in store.lengths]
        return cls(
            row_B=torch.arange(len(store.lengths), device=device),
            place_B=slot_of(length_B, spec.w_sink, spec.w_recent),
            empty_BW=empty_BW,
            pages=PageIndices.of(pages.owner, pages.filled, pages.newest, offset, device),
        )


class FirstChunksView(AttentionView):
    """The first tokens of several new sequences, packed into one row: attended to as in training, then stored."""

    def __init__(self, store: KVStore, inner: AttentionView, spans: list[tuple[int, int, int]]) -> None:
        """spans: (slot, first column, tokens) of each sequence. inner: the hybrid's own view of this kind of layer."""
        self.store = store
        self.inner = inner
        self.spans = spans

    def attend(self, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout):
        layer = self.store.layers[module.layer_idx]
        for slot, first, tokens in self.spans:
            k_GTD, v_GTD = k_1GTD[0, :, first : first + tokens], v_1GTD[0, :, first : first + tokens]
            if isinstance(layer, RingLayer):
                layer.write(slot, k_GTD, v_GTD, 0)
            else:
                layer.write(k_GTD, v_GTD, 0, self.store.pages[slot])
        return self.inner.attend(module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout)


class LaterChunkView(AttentionView):
    """Further tokens of one sequence whose earlier ones are in the store."""

    def __init__(self, store: KVStore, slot: int, tokens: int) -> None:
        self.store = store
        self.slot = slot
        self.before = store.lengths[slot]
        self.after = self.before + tokens

    def attend(self, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout):
        layer = self.store.layers[module.layer_idx]
        position_T1 = torch.arange(self.before, self.after, device=layer.device)[:, None]
        k_GTD, v_GTD = k_1GTD[0], v_1GTD[0]
        sinks_H = None
        if isinstance(layer, RingLayer):
            sinks_H = sinks_of(module, self.store.spec, q_1HTD)
            spec = self.store.spec
            held = min(self.before, spec.window)
            before_1 = torch.tensor([self.before], device=layer.device)
            position_K = torch.cat([slot_positions(before_1, held, spec.w_sink, spec.w_recent)[0], position_T1[:, 0]])
            k_GKD = torch.cat([layer.keys[self.slot, :, :held], k_GTD], dim=1)
            v_GKD = torch.cat([layer.values[self.slot, :, :held], v_GTD], dim=1)
            visible_TK = streaming_visible(position_T1, position_K, spec.w_sink, spec.w_recent)
            layer.write(self.slot, k_GTD, v_GTD, self.before)
        else:
            layer.write(k_GTD, v_GTD, self.before, self.store.pages[self.slot])
            k_GKD, v_GKD = layer.read(self.after, self.store.pages[self.slot])
            visible_TK = full_visible(position_T1, torch.arange(self.after, device=layer.device))
        if sinks_H is not None:
            return sdpa_with_sinks(q_1HTD, k_GKD[None], v_GKD[None], visible_TK[None], sinks_H, scaling).transpose(1, 2)
        grouped = q_1HTD.shape[1] != k_GKD.shape[0]
        out_1HTD = scaled_dot_product_attention(
            q_1HTD, k_GKD[None], v_GKD[None], attn_mask=visible_TK, scale=scaling, enable_gqa=grouped
        )
        return out_1HTD.transpose(1, 2)
