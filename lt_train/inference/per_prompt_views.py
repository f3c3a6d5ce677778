"""Views of a layer's queries while the engine runs sequences that stream in layers of their own.

Shapes as in views.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lt_train.hybrid.cache import slot_of
from lt_train.hybrid.views import AttentionView, FullView
from lt_train.inference.block_attention import attend_blocks, obstacle
from lt_train.inference.fused_attention import full_attention
from lt_train.inference.key_blocks import page_blocks
from lt_train.inference.kv_store import PAGE
from lt_train.inference.lazy_ratio import lazy_ratio
from lt_train.inference.per_prompt_store import PerPromptStore
from lt_train.inference.views import PageIndices, attend_pages


class PromptsView(AttentionView):
    """Complete prompts, packed into one row: full attention in every layer; the lazy ratios of each decide what is cached."""

    def __init__(self, store: PerPromptStore, inner: FullView, spans: list[tuple[int, int, int]]) -> None:
        """spans: (slot, first column, tokens) of each prompt. inner: the hybrid's own view of a full layer."""
        self.store = store
        self.inner = inner
        self.spans = spans

    def attend(self, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout):
        spec, w_last = self.store.spec, self.store.per_prompt.w_last
        out_1THD, lses = full_attention(self.inner, module, q_1HTD, k_1GTD, v_1GTD, scaling, dropout)
        for (slot, first, tokens), lse_1HS in zip(self.spans, lses, strict=True):
            q_1HSD, k_1GSD, v_1GSD = (x[:, :, first : first + tokens] for x in (q_1HTD, k_1GTD, v_1GTD))
            ratio = lazy_ratio(q_1HSD, k_1GSD, scaling, spec.w_sink, spec.w_recent, w_last, lse_BHT=lse_1HS)
            self.store.write_prompt(slot, module.layer_idx, k_1GSD[0], v_1GSD[0], ratio)
        return out_1THD


class PerPromptStepView(AttentionView):
    """One new token for every running sequence: row b is the sequence in slot b.

    The pages of a layer are spread over the pool: for torch's products they are copied together first.
    """

    def __init__(self, store: PerPromptStore) -> None:
        self.store = store

    def attend(self, module, q_BH1D, k_BG1D, v_BG1D, scaling, dropout):
        store, layer = self.store, LayerIndices.of(self.store, module.layer_idx)
        store.keys[layer.newest_B, :, layer.offset_B] = k_BG1D[:, :, 0]
        store.values[layer.newest_B, :, layer.offset_B] = v_BG1D[:, :, 0]
        q_BGRD = q_BH1D[:, :, 0].unflatten(1, (k_BG1D.shape[1], -1))
        if obstacle(store.keys.device, store.keys.dtype) is None:
            blocks = page_blocks(store.keys, layer.held, layer.places_B1).to(store.keys.device)
            out_BGRD = attend_blocks(q_BGRD, store.keys, store.values, blocks, scaling, None).to(q_BGRD.dtype)
        else:
            k_NGPD, v_NGPD = store.keys[layer.page_N], store.values[layer.page_N]
            out_BGRD = attend_pages(q_BGRD, k_NGPD, v_NGPD, layer.pages, scaling)
        return out_BGRD.flatten(1, 2)[:, None]


@dataclass
class LayerIndices:
    """The places of a step's cached tokens in one layer.

    Attributes:
        held: the pages of each sequence. places: how many places of them it uses, the new token's included.
        newest_B, offset_B: the page and place of each new token.
    """

    held: list[list[int]]
    places: list[int]
    newest_B: Tensor
    offset_B: Tensor

    @classmethod
    def of(cls, store: PerPromptStore, layer: int) -> "LayerIndices":
        held, used, newest, offset = [], [], [], []
        for sequence, length in zip(store.sequences, store.lengths, strict=True):
            streams, pages = layer in sequence.streaming, sequence.pages[layer]
            place = slot_of(length, store.spec.w_sink, store.spec.w_recent) if streams else length
            held.append(pages)
            used.append(min(length + 1, store.spec.window) if streams else length + 1)
            newest.append(pages[place // PAGE])
            offset.append(place % PAGE)
        device = store.keys.device
        return cls(held, used, torch.tensor(newest, device=device), torch.tensor(offset, device=device))

    @property
    def places_B1(self) -> Tensor:
        return torch.tensor(self.places)[:, None]

    @property
    def page_N(self) -> Tensor:
        """The pages of all sequences, one after the other."""
        return torch.tensor([page for pages in self.held for page in pages], device=self.newest_B.device)

    @property
    def pages(self) -> PageIndices:
        """Which sequence each of `page_N` belongs to, and which of its places are used."""
        owner = [slot for slot, pages in enumerate(self.held) for _ in pages]
        filled = [
            min(max(places - number * PAGE, 0), PAGE)
            for pages, places in zip(self.held, self.places, strict=True)
            for number in range(len(pages))
        ]
        return PageIndices.of(owner, filled, self.newest_B.device)
