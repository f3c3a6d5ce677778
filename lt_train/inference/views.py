"""Views of a layer's queries while the engine runs: each writes the new keys and values into the store, then attends.

Shapes as in kv_store.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from lt_train.hybrid.blocked import blocked_streaming_attention
from lt_train.hybrid.cache import slot_of, slot_positions
from lt_train.hybrid.learned_sinks import sdpa_with_sinks, sinks_of, sinks_of_base, softmax_with_sinks
from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import AttentionView
from lt_train.inference.block_attention import attend_blocks, obstacle
from lt_train.inference.fused_attention import later_tokens_attention
from lt_train.inference.key_blocks import KeyBlocks, page_blocks, ring_blocks
from lt_train.inference.kv_store import PAGE, CachedHeads, KVStore, PagedLayer, RingLayer


class StoredView(AttentionView):
    """Queries that attend to the store: each group of KV heads that is cached alike by itself."""

    def __init__(self, store: KVStore) -> None:
        self.store = store

    def attend(self, module, q_BHTD, k_BGTD, v_BGTD, scaling, dropout):
        groups = self.store.layers[module.layer_idx]
        if len(groups) == 1:
            return self.attend_group(groups[0], module, q_BHTD, k_BGTD, v_BGTD, scaling)
        kv_heads = k_BGTD.shape[1]
        q_BGRTD = q_BHTD.unflatten(1, (kv_heads, -1))
        out_BTHD = q_BHTD.new_empty(q_BHTD.transpose(1, 2).shape)
        out_BTGRD = out_BTHD.unflatten(2, (kv_heads, -1))
        for group in groups:
            head_G = group.head_G
            qkv = q_BGRTD[:, head_G].flatten(1, 2), k_BGTD[:, head_G], v_BGTD[:, head_G]
            out_BTGRD[:, :, head_G] = self.attend_group(group, module, *qkv, scaling).unflatten(2, (len(head_G), -1))
        return out_BTHD

    def attend_group(
        self, group: CachedHeads, module: nn.Module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scaling: float
    ) -> Tensor:
        """Cache the new keys and values of a group's heads, then attend. Returns out_BTHD."""
        raise NotImplementedError


class StepView(StoredView):
    """New tokens for every running sequence, equally many: row b is the sequence in slot b.

    Q = R x T are the queries of one key/value head.
    """

    def __init__(self, store: KVStore, indices: "Callable[[torch.device], StepIndices]", tokens: int, drafts: bool) -> None:
        """
        Args:
            indices: the places of the tokens, on a device.
            tokens: of each sequence.
            drafts: the draft attends; else the model itself does.
        """
        super().__init__(store)
        self.indices = indices
        self.tokens = tokens
        self.drafts = drafts

    @classmethod
    def after(cls, store: KVStore, first: Sequence[int], tokens: int, drafts: bool) -> "StepView":
        """first: the position of the first new token of each sequence."""
        return cls(store, cache(lambda device: StepIndices(store, first, tokens, device)), tokens, drafts)

    def attend_group(self, group, module, q_BHTD, k_BGTD, v_BGTD, scaling):
        layer = group.draft if self.drafts else group.model
        indices = self.indices(layer.device)
        for held in group.held:
            at = indices.of_ring(held).places if isinstance(held, RingLayer) else indices.in_pages
            held.keys[at[0], :, at[1]] = k_BGTD.transpose(1, 2)
            held.values[at[0], :, at[1]] = v_BGTD.transpose(1, 2)
        groups = k_BGTD.shape[1]
        q_BGQD = q_BHTD.unflatten(1, (groups, -1)).flatten(2, 3)
        sinks_GQ, sinks_H = None, _sinks_of(module, layer, q_BHTD)
        if sinks_H is not None:
            sinks_GQ = sinks_H.unflatten(0, (groups, -1)).repeat_interleave(self.tokens, 1)
        if (blocks := indices.blocks(layer)) is not None:
            out_BGQD = attend_blocks(q_BGQD, layer.keys, layer.values, blocks, scaling, sinks_GQ).to(q_BGQD.dtype)
        elif isinstance(layer, RingLayer):
            out_BGQD = self._ring(layer, indices, q_BGQD, scaling, sinks_GQ)
        else:
            used = indices.pages.owner_N.shape[0]
            out_BGQD = attend_pages(q_BGQD, layer.keys[:used], layer.values[:used], indices.pages, scaling, sinks_GQ)
        return out_BGQD.unflatten(2, (-1, self.tokens)).flatten(1, 2).transpose(1, 2)

    def _ring(self, layer: RingLayer, indices: "StepIndices", q_BGQD, scaling, sinks_GQ):
        ring, rows = indices.of_ring(layer), q_BGQD.shape[0]
        used, hidden_BTW = ring.used, ring.hidden_BTW
        k_BGWD, v_BGWD = layer.keys[:rows, :, :used], layer.values[:rows, :, :used]
        weights_BGQW = _product(q_BGQD, k_BGWD.transpose(-1, -2)).mul_(scaling)
        if hidden_BTW is not None:
            weights_BGQW = _hide(weights_BGQW, hidden_BTW)
        return _product(softmax_with_sinks(weights_BGQW, sinks_GQ), v_BGWD).to(q_BGQD.dtype)


def _sinks_of(module: nn.Module, layer: PagedLayer | RingLayer, q_BHTD: Tensor) -> Tensor | None:
    """The sink logits [H] of a layer, cached so; None where it has none."""
    return sinks_of(module, layer.spec, q_BHTD) if isinstance(layer, RingLayer) else sinks_of_base(module, q_BHTD)


def _hide(weights_NGQK: Tensor, hidden_NTK: Tensor) -> Tensor:
    tokens = hidden_NTK.shape[1]
    return weights_NGQK.unflatten(2, (-1, tokens)).masked_fill(hidden_NTK[:, None, None], float("-inf")).flatten(2, 3)


def attend_pages(
    q_BGRD: Tensor, k_NGPD: Tensor, v_NGPD: Tensor, pages: "PageIndices", scaling: float, sinks_GR: Tensor | None = None
) -> Tensor:
    """Every page meets the queries of its owner; the parts of one sequence are then joined as one softmax, with `sinks_GR`, the
    learned sinks. Returns out_BGRD."""
    rows = q_BGRD.shape[0]
    q_NGRD = torch.cat([q_BGRD, q_BGRD.new_zeros(1, *q_BGRD.shape[1:])])[pages.owner_N]
    logits_NGRP = _product(q_NGRD, k_NGPD.transpose(-1, -2)).mul_(scaling)
    logits_NGRP[pages.partial_M] = _hide(logits_NGRP[pages.partial_M], pages.hidden_MTP)
    largest_NGR = logits_NGRP.amax(-1)
    shape = (rows + 1, *largest_NGR.shape[1:])
    owner_NGR = pages.owner_N[:, None, None].expand_as(largest_NGR)
    largest_BGR = largest_NGR.new_full(shape, float("-inf")).scatter_reduce(0, owner_NGR, largest_NGR, "amax")
    largest_BGR[rows] = 0  # pages without an owner: any finite value
    if sinks_GR is not None:
        largest_BGR = largest_BGR.maximum(sinks_GR)
    weights_NGRP = logits_NGRP.sub_(largest_BGR[pages.owner_N].unsqueeze(-1)).exp_()
    total_BGR = largest_NGR.new_zeros(shape).index_add(0, pages.owner_N, weights_NGRP.sum(-1))
    if sinks_GR is not None:
        total_BGR = total_BGR + (sinks_GR - largest_BGR).exp()
    part_NGRD = _product(weights_NGRP, v_NGPD)
    sum_BGRD = part_NGRD.new_zeros(*shape, part_NGRD.shape[-1]).index_add(0, pages.owner_N, part_NGRD)
    return (sum_BGRD[:rows] / total_BGR[:rows].unsqueeze(-1)).to(q_BGRD.dtype)


def _product(a_BGRK: Tensor, b_BGKC: Tensor) -> Tensor:
    """The matrix product in fp32 or better, with b in bf16 and fp16 too: rounded to those, large scores would shift the softmax."""
    if b_BGKC.dtype not in (torch.bfloat16, torch.float16):
        return a_BGRK @ b_BGKC
    return a_BGRK.float() @ b_BGKC.float()


@dataclass
class PageIndices:
    """Which page belongs to which slot, on one device. partial_M are the pages of which some query does not see every place,
    hidden_MTP the places that the queries of each new token do not see."""

    owner_N: Tensor
    partial_M: Tensor
    hidden_MTP: Tensor

    @classmethod
    def of(cls, owner: list[int], filled: list[int], device: torch.device, tokens: int = 1) -> "PageIndices":
        """owner, filled: by page, see `PageMap`. tokens: new ones of each sequence, cached already."""
        seen_NT = torch.tensor(filled, device=device)[:, None] - torch.arange(tokens - 1, -1, -1, device=device)
        partial_M = (seen_NT[:, 0] < PAGE).nonzero()[:, 0]
        hidden_MTP = torch.arange(PAGE, device=device) >= seen_NT[partial_M, :, None]
        return cls(torch.tensor(owner, device=device), partial_M, hidden_MTP)


class StepIndices:
    """The places of a step's cached tokens, on one device; all layers share it."""

    def __init__(self, store: KVStore, first: Sequence[int], tokens: int, device: torch.device) -> None:
        """first: the position of the first new token of each sequence."""
        self.store = store
        self.first = first
        self.tokens = tokens
        self.device = device
        self._rings: dict[HybridSpec, RingIndices] = {}
        self._blocks: dict[Kind, KeyBlocks] = {}

    def blocks(self, layer: PagedLayer | RingLayer) -> KeyBlocks | None:
        """The places of a layer's keys in blocks; None where attention to blocks cannot compute this step."""
        if obstacle(self.device, layer.keys.dtype) is not None:
            return None
        kind = kind_of(layer)
        if kind not in self._blocks:
            self._blocks[kind] = self.blocks_of(layer).to(self.device)
        return self._blocks[kind]

    def blocks_of(self, layer: PagedLayer | RingLayer) -> KeyBlocks:
        """The places of a layer's keys in blocks, on the CPU."""
        if isinstance(layer, PagedLayer):
            return page_blocks(layer.keys, self.store.pages, self._position_on_cpu_BT + 1)
        return ring_blocks(layer, self._position_on_cpu_BT)

    def of_ring(self, layer: RingLayer) -> "RingIndices":
        """The places in a ring of this layer's sizes."""
        if layer.spec not in self._rings:
            self._rings[layer.spec] = RingIndices(layer.spec, layer.recent, self.first, self.position_BT)
        return self._rings[layer.spec]

    @property
    def in_pages(self) -> tuple[Tensor, Tensor]:
        """Page and place [B, T] of each new token."""
        return self.page_BT, self.position_BT % PAGE

    @cached_property
    def pages(self) -> PageIndices:
        pages = self.store.page_map(self.first, self.tokens)
        return PageIndices.of(pages.owner, pages.filled, self.device, self.tokens)

    @cached_property
    def position_BT(self) -> Tensor:
        return self._position_on_cpu_BT.to(self.device)

    @cached_property
    def page_BT(self) -> Tensor:
        """The page of each new token in full layers."""
        return torch.tensor(self.store.newest_pages(self.first, self.tokens), device=self.device)

    @cached_property
    def _position_on_cpu_BT(self) -> Tensor:
        return torch.tensor(self.first)[:, None] + torch.arange(self.tokens)


Kind = tuple[HybridSpec | None, tuple[int, ...]]
"""What layers whose keys lie alike have in common."""


def kind_of(layer: PagedLayer | RingLayer) -> Kind:
    return layer.spec if isinstance(layer, RingLayer) else None, layer.keys.stride()


class RingIndices:
    """The places of new tokens in rings of one size, on one device."""

    def __init__(self, spec: HybridSpec, recent: int, first: Sequence[int], position_BT: Tensor) -> None:
        """recent: latest tokens that the ring holds. first: the position of the first new token of each row."""
        self.spec, self.recent, self.first, self.position_BT = spec, recent, first, position_BT

    @property
    def used(self) -> int:
        """Places that hold a token of some row."""
        return min(max(self.first) + self.position_BT.shape[1], self.spec.w_sink + self.recent)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and place [B, T] of each new token."""
        row_B1 = torch.arange(len(self.position_BT), device=self.position_BT.device)[:, None]
        return row_B1, slot_of(self.position_BT, self.spec.w_sink, self.recent)

    @cached_property
    def hidden_BTW(self) -> Tensor | None:
        """The places that the query of each new token does not see; None where every query sees all of them."""
        spec = self.spec
        if self.position_BT.shape[1] == 1 and min(self.first) + 1 >= self.used and self.used <= spec.window:
            return None
        position_BW = slot_positions(self.position_BT[:, -1] + 1, self.used, spec.w_sink, self.recent)
        return ~streaming_visible(self.position_BT[:, :, None], position_BW[:, None], spec.w_sink, spec.w_recent)


class FirstChunksView(AttentionView):
    """The first tokens of several new sequences, packed into one row: attended to as in training, then stored."""

    def __init__(self, store: KVStore, inner: AttentionView, spans: list[tuple[int, int, int]]) -> None:
        """spans: (slot, first column, tokens) of each sequence. inner: the hybrid's own view of all layers."""
        self.store = store
        self.inner = inner
        self.spans = spans

    def attend(self, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout):
        for slot, first, tokens in self.spans:
            k_GTD, v_GTD = k_1GTD[0, :, first : first + tokens], v_1GTD[0, :, first : first + tokens]
            self.store.write(module.layer_idx, slot, k_GTD, v_GTD, 0)
        return self.inner.attend(module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout)


class LaterChunkView(StoredView):
    """Further tokens of one sequence whose earlier ones are in the store."""

    def __init__(self, store: KVStore, slot: int, tokens: int) -> None:
        super().__init__(store)
        self.slot = slot
        self.before = store.lengths[slot]
        self.after = self.before + tokens

    def attend_group(self, group, module, q_1HTD, k_1GTD, v_1GTD, scaling):
        layer, pages = group.model, self.store.pages[self.slot]
        position_T = torch.arange(self.before, self.after, device=layer.device)
        k_GTD, v_GTD = k_1GTD[0], v_1GTD[0]
        sinks_H = _sinks_of(module, layer, q_1HTD)
        if isinstance(layer, RingLayer):
            w_sink, w_recent = layer.spec.w_sink, layer.spec.w_recent
            position_C, k_GCD, v_GCD = self._cached(layer)
            k_GKD, v_GKD = torch.cat([k_GCD, k_GTD], dim=1), torch.cat([v_GCD, v_GTD], dim=1)
            group.write(self.slot, k_GTD, v_GTD, self.before, pages)
            if attends_in_parts(layer.device):  # no query sees what lay between the sinks and the cached window
                out_1HTD = blocked_streaming_attention(
                    *(q_1HTD, k_GKD[None], v_GKD[None]), w_sink=w_sink, w_recent=w_recent, scaling=scaling, sinks_H=sinks_H
                )
                return out_1HTD.transpose(1, 2)
            mask_TK = streaming_visible(position_T[:, None], torch.cat([position_C, position_T]), w_sink, w_recent)
        else:
            group.write(self.slot, k_GTD, v_GTD, self.before, pages)
            k_GKD, v_GKD = layer.read(self.after, pages)
            if attends_in_parts(layer.device):
                return later_tokens_attention(q_1HTD, k_GKD[None], v_GKD[None], scaling, sinks_H).transpose(1, 2)
            if sinks_H is None:  # flash attention knows this mask, and none that is dense
                mask_TK = causal_lower_right(len(position_T), self.after)
            else:
                mask_TK = full_visible(position_T[:, None], torch.arange(self.after, device=layer.device))
        if sinks_H is not None:
            return sdpa_with_sinks(q_1HTD, k_GKD[None], v_GKD[None], mask_TK[None], sinks_H, scaling).transpose(1, 2)
        grouped = q_1HTD.shape[1] != k_GKD.shape[0]
        out_1HTD = scaled_dot_product_attention(
            q_1HTD, k_GKD[None], v_GKD[None], attn_mask=mask_TK, scale=scaling, enable_gqa=grouped
        )
        return out_1HTD.transpose(1, 2)

    def _cached(self, layer: RingLayer) -> tuple[Tensor, Tensor, Tensor]:
        """position_C, k_GCD and v_GCD of the C tokens that a ring holds, in their order."""
        spec, held = layer.spec, min(self.before, layer.spec.w_sink + layer.recent)
        before_1 = torch.tensor([self.before], device=layer.device)
        position_C, order_C = slot_positions(before_1, held, spec.w_sink, layer.recent)[0].sort()
        return position_C, layer.keys[self.slot, :, order_C], layer.values[self.slot, :, order_C]


def attends_in_parts(device: torch.device) -> bool:
    """Whether later chunks attend without a mask, in parts; elsewhere one kernel with a mask takes fewer launches."""
    return device.type == "cpu"
