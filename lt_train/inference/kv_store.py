"""The KV cache of many sequences, allocated once: full layers in pages that sequences take as they grow, streaming layers in one
ring per slot, and so sliding layers, in a ring of the base's window. A layer that is full in the model and streams in its draft has
both, with the model's own keys and values. Of a split layer, each KV head is cached as it attends.

A running sequence has a slot; the running ones are slots 0 to B - 1. Attention reads keys and values in place: a step copies none
of them. The lowest free page is allocated first, so the pages in use stay together.

A draft's tokens are cached before it is known which of them stay. So its rings hold as many tokens more than the window: what a
rejected token overwrote, no later query sees. Dropping rejected tokens is then no more than a smaller length.

Shapes: S slots, B running sequences, N pages, P tokens of a page, W tokens of a ring, H query heads, G key/value heads,
R = H / G, T new tokens of one sequence, D head size.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lt_train.hybrid.cache import slot_of
from lt_train.hybrid.kv_size import head_bytes, head_size
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.runtime.huge_pages import huge_zeros

PAGE = 128
"""Tokens of a page: large enough for an efficient product, small enough to waste little: on average half a page a sequence."""


@dataclass(frozen=True)
class KVSizes:
    """Bytes of KV cache."""

    page: int
    """One page in all full layers and of all full KV heads of split ones."""
    slot: int
    """One ring in all streaming and sliding layers and of all streaming KV heads, of the draft too."""
    drafted: int = 0
    """Tokens of a sequence that are cached before it is known whether they stay."""

    def pages(self, tokens: int) -> int:
        """Pages of one sequence of `tokens` tokens."""
        return pages_for(tokens + self.drafted)

    def sequence(self, tokens: int) -> int:
        """One sequence of `tokens` tokens."""
        return self.slot + self.pages(tokens) * self.page


def kv_sizes(model: HybridForCausalLM, draft: Draft | None = None) -> KVSizes:
    spec, heads, of_head = model.spec, model.config.kv_heads, head_bytes(model.config.to_dict(), model.dtype.itemsize)
    attending, drafted = (spec, 0) if draft is None else (draft.spec, draft.length)
    streaming, rings = (each.number_of_streaming_heads(heads) for each in (spec, attending))
    sliding = len(spec.sliding_layers) * heads
    full = spec.num_layers * heads - streaming - sliding
    of_rings = rings * (spec.window + drafted) + sliding * (spec.sliding_window + drafted)
    return KVSizes(full * PAGE * of_head, of_rings * of_head, drafted)


def pages_for(tokens: int) -> int:
    return math.ceil(tokens / PAGE)


class KVStore:
    """The pages and rings of all layers, and their assignment to sequences.

    Attributes:
        lengths: cached tokens of each running sequence, by slot.
        pages: the pages of each running sequence, in the order of its tokens, by slot.
        layers: by layer, its KV heads in groups that are cached alike: all together, but in a split layer.
    """

    def __init__(self, model: HybridForCausalLM, slots: int, pages: int, draft: Draft | None = None) -> None:
        self.spec = model.spec
        self.draft = draft
        self.sizes = kv_sizes(model, draft)
        self.slots = slots
        self.lengths: list[int] = []
        self.pages: list[list[int]] = []
        self._free = list(range(pages))  # a heap: the lowest page first
        self.layers: list[list[CachedHeads]] = []
        heads, size = model.config.kv_heads, head_size(model.config.to_dict())
        streaming = self.spec.streaming_heads(heads)
        drafting = streaming if draft is None else draft.spec.streaming_heads(heads)
        for index, layer in enumerate(model.model.layers):
            device = next(layer.parameters()).device
            slides = self.spec.slides(index)
            groups: dict[tuple[bool, bool], list[int]] = {}
            for head in range(heads):
                kinds = (True, True) if slides else (head in streaming[index], head in drafting[index])
                groups.setdefault(kinds, []).append(head)
            self.layers.append([])
            for (streams, drafts), of_kind in groups.items():
                held: list[PagedLayer | RingLayer] = []
                if not streams:
                    shape = (2, pages, len(of_kind), PAGE, size)
                    held.append(PagedLayer(huge_zeros(shape, model.dtype, device)))
                if streams or drafts:
                    spec = self.spec.sliding if slides else self.spec
                    shape = (2, slots, len(of_kind), spec.window + self.sizes.drafted, size)
                    held.append(RingLayer(huge_zeros(shape, model.dtype, device), spec))
                self.layers[-1].append(CachedHeads(torch.tensor(of_kind, device=device), held[0], held[-1]))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def has_room(self, tokens: int) -> bool:
        """Whether there are pages for one more sequence of `tokens` tokens, and for the next tokens of each running sequence."""
        return self.sizes.pages(tokens + 1) + len(self.lengths) * self.sizes.pages(1) <= self.free_pages

    def admit(self, tokens: int) -> int:
        """Allocate a slot, and pages for `tokens` tokens. The caller checks that there are enough."""
        self.lengths.append(0)
        self.pages.append([])
        slot = len(self.lengths) - 1
        self.reserve(slot, tokens)
        return slot

    def reserve(self, slot: int, tokens: int) -> None:
        """Allocate pages until the sequence has enough for `tokens` tokens in all."""
        while len(self.pages[slot]) < pages_for(tokens):
            self.pages[slot].append(heapq.heappop(self._free))

    def missing_pages(self, slot: int, tokens: int) -> int:
        """The number of pages that the sequence still needs for `tokens` tokens."""
        return max(0, pages_for(tokens) - len(self.pages[slot]))

    def release(self, slot: int) -> int:
        """Free a sequence's slot and pages. The sequence of the last slot moves into the slot; returns the slot it moved from."""
        for page in self.pages[slot]:
            heapq.heappush(self._free, page)
        last = len(self.lengths) - 1
        if slot != last:
            for held in self.held:
                held.move(last, slot)
        self.lengths[slot], self.pages[slot] = self.lengths[last], self.pages[last]
        self.lengths.pop()
        self.pages.pop()
        return last

    @property
    def held(self) -> list["PagedLayer | RingLayer"]:
        """The pages and rings of all layers, each once."""
        return [held for groups in self.layers for group in groups for held in group.held]

    def write(self, layer: int, slot: int, k_GTD: Tensor, v_GTD: Tensor, first: int) -> None:
        """Cache new tokens of one sequence in one layer, from position `first` on."""
        groups = self.layers[layer]
        for group in groups:
            kv = (k_GTD, v_GTD) if len(groups) == 1 else (k_GTD[group.head_G], v_GTD[group.head_G])
            group.write(slot, *kv, first, self.pages[slot])

    def page_map(self, first: Sequence[int], tokens: int) -> "PageMap":
        """The pages of the running sequences, for a step that adds `tokens` tokens to each, from the positions `first` on."""
        highest = max((page for pages in self.pages for page in pages), default=-1)
        owner = [len(self.lengths)] * (highest + 1)  # free pages are assigned to an additional row that is not read
        filled = [0] * (highest + 1)
        for slot, pages in enumerate(self.pages):
            for number, page in enumerate(pages):
                owner[page] = slot
                filled[page] = first[slot] + tokens - number * PAGE
        return PageMap(owner, filled)

    def newest_pages(self, first: Sequence[int], tokens: int) -> list[list[int]]:
        """By slot, the page of each token that a step adds."""
        return [[pages[(at + new) // PAGE] for new in range(tokens)] for pages, at in zip(self.pages, first, strict=True)]


@dataclass
class PageMap:
    """Which slot each page belongs to, and how far it is filled after a step."""

    owner: list[int]
    """By page, the slot it belongs to."""
    filled: list[int]
    """By page, the number of its sequence's tokens from its first place on: above PAGE where there are later pages, 0 or less where
    it holds none yet."""


@dataclass(frozen=True)
class CachedHeads:
    """KV heads of one layer that are cached alike.

    Attributes:
        head_G: their indices in the layer.
        model: what the model attends to. draft: what its draft attends to; the same where both are of a kind.
    """

    head_G: Tensor
    model: "PagedLayer | RingLayer"
    draft: "PagedLayer | RingLayer"

    @property
    def held(self) -> set["PagedLayer | RingLayer"]:
        return {self.model, self.draft}

    def write(self, slot: int, k_GTD: Tensor, v_GTD: Tensor, first: int, pages: list[int]) -> None:
        """Cache new tokens of one sequence, which has `pages`, from position `first` on."""
        for held in self.held:
            if isinstance(held, RingLayer):
                held.write(slot, k_GTD, v_GTD, first)
            else:
                held.write(k_GTD, v_GTD, first, pages)


class PagedLayer:
    """Keys and values of the full heads of one layer: kv is [2, N, G, P, D]."""

    def __init__(self, kv_2NGPD: Tensor) -> None:
        self.keys, self.values = kv_2NGPD
        self.device = kv_2NGPD.device

    def move(self, source: int, target: int) -> None:
        """Does nothing: pages do not depend on the slot."""

    def write(self, k_GTD: Tensor, v_GTD: Tensor, first: int, pages: list[int]) -> None:
        """Write new tokens of one sequence to its pages, from position `first` on."""
        position_T = torch.arange(first, first + k_GTD.shape[1], device=self.device)
        page_T = torch.tensor(pages, device=self.device)[position_T // PAGE]
        self.keys[page_T, :, position_T % PAGE] = k_GTD.transpose(0, 1)
        self.values[page_T, :, position_T % PAGE] = v_GTD.transpose(0, 1)

    def read(self, length: int, pages: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, [G, length, D] each: copies, for a chunk of many queries."""
        page_N = torch.tensor(pages[: pages_for(length)], device=self.device)
        keys, values = (x[page_N].transpose(0, 1).flatten(1, 2)[:, :length] for x in (self.keys, self.values))
        return keys, values


class RingLayer:
    """Sinks and latest keys and values of the streaming heads of one layer, or of a sliding layer: kv is [2, S, G, W, D].

    `slot_of`, the rule of the hybrid's own cache, gives the place of each position in the ring.

    Attributes:
        spec: decides what its queries see.
        recent: the number of latest tokens that it holds, w_recent or more.
    """

    def __init__(self, kv_2SGWD: Tensor, spec: HybridSpec) -> None:
        self.keys, self.values = kv_2SGWD
        self.spec, self.w_sink = spec, spec.w_sink
        self.recent = kv_2SGWD.shape[3] - spec.w_sink
        self.device = kv_2SGWD.device

    def move(self, source: int, target: int) -> None:
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def write(self, slot: int, k_GTD: Tensor, v_GTD: Tensor, first: int) -> None:
        """Write new tokens of one sequence to its ring, from position `first` on, if the ring still holds them afterwards."""
        position_T = torch.arange(first, first + k_GTD.shape[1], device=self.device)
        kept_T = (position_T < self.w_sink) | (position_T >= first + k_GTD.shape[1] - self.recent)
        place_K = slot_of(position_T[kept_T], self.w_sink, self.recent)
        self.keys[slot, :, place_K] = k_GTD[:, kept_T]
        self.values[slot, :, place_K] = v_GTD[:, kept_T]
