"""The KV cache of sequences that stream in layers of their own: LightTransfer-Test (arXiv 2410.13846, Section 3.2).

One pool of pages for all layers: a page holds tokens of one layer of one sequence. A layer that stays full takes pages as its
sequence grows; one that streams keeps sinks and latest tokens in as many pages as hold the window, at the places of a ring
(`slot_of`). The layer that leaves the queue of a prompt gives its pages back at once, so a prompt never holds more than `keep`
full layers.

Shapes: N pages, P tokens of a page, G key/value heads, K tokens, D head size.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from lt_train.hybrid.cache import slot_of
from lt_train.hybrid.kv_size import head_size, token_bytes
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import PAGE, pages_for
from lt_train.inference.per_prompt import LayerQueue, PerPrompt
from lt_train.inference.requests import Request
from lt_train.runtime.errors import UserError
from lt_train.runtime.huge_pages import huge_zeros


def check_one_device(model: HybridForCausalLM) -> None:
    """
    Raises:
        UserError: layers on several devices.
    """
    devices = {str(next(layer.parameters()).device) for layer in model.model.layers}
    if len(devices) > 1:
        raise UserError(
            f"per_prompt: the layers are on {', '.join(sorted(devices))}, and all layers share one pool of pages. "
            "Fix: load the model on one device"
        )


def check_read_at_once(request: Request, prefill_chunk: int) -> None:
    """
    Raises:
        UserError: the prompt is longer than a forward pass. Its last queries decide which layers stream, so earlier passes would
            have to cache all of it in every layer.
    """
    tokens = len(request.prompt_ids)
    if tokens > prefill_chunk:
        raise UserError(
            f"prefill_chunk: {prefill_chunk:,}: prompt {request.problem} has {tokens:,} tokens, and a prompt that decides "
            f"which layers stream is read in one pass. Fix: set prefill_chunk to at least {tokens:,}"
        )


@dataclass(frozen=True)
class PerPromptSizes:
    """Pages and bytes of KV cache."""

    page: int
    """Bytes of one page: `PAGE` tokens of one layer."""
    spec: HybridSpec
    keep: int

    @classmethod
    def of(cls, model: HybridForCausalLM, per_prompt: PerPrompt) -> "PerPromptSizes":
        return cls(PAGE * token_bytes(model.config.to_dict(), model.dtype.itemsize), model.spec, per_prompt.keep)

    def pages(self, tokens: int) -> int:
        """Pages of one sequence of `tokens` tokens in all layers, and the most that it holds while its prompt is read."""
        streaming = self.spec.num_layers - self.keep
        return self.keep * pages_for(tokens) + streaming * pages_for(min(tokens, self.spec.window))

    def sequence(self, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens."""
        return self.pages(tokens) * self.page


@dataclass
class CachedSequence:
    """The cache of one sequence: its pages by layer, and which of its layers stream.

    Attributes:
        reserved: pages that it may take in all.
    """

    pages: list[list[int]]
    reserved: int
    queue: LayerQueue

    @property
    def streaming(self) -> set[int]:
        return self.queue.streaming


class PerPromptStore:
    """The pages of all sequences. A sequence reserves all it may need when it is admitted, and is never put back: read again,
    its answer would be part of the prompt that decides which layers stream.

    Attributes:
        lengths: cached tokens of each running sequence, by slot.
        sequences: what each running sequence holds, by slot.
    """

    def __init__(self, model: HybridForCausalLM, per_prompt: PerPrompt, slots: int, pages: int) -> None:
        self.spec = model.spec
        self.per_prompt = per_prompt
        self.sizes = PerPromptSizes.of(model, per_prompt)
        self.slots = slots
        self.num_pages = pages
        self.lengths: list[int] = []
        self.sequences: list[CachedSequence] = []
        self._free = list(range(pages))  # a heap: the lowest page first
        heads = model.config.kv_heads
        shape = (2, pages, heads, PAGE, head_size(model.config.to_dict()))
        self.keys, self.values = huge_zeros(shape, model.dtype, model.device)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def has_room(self, tokens: int) -> bool:
        """Whether one more sequence may grow to `tokens` tokens beside the running ones."""
        return self.sizes.pages(tokens) + sum(sequence.reserved for sequence in self.sequences) <= self.num_pages

    def admit(self, tokens: int) -> int:
        """Give a sequence a slot, and reserve pages for `tokens` tokens, prompt and answer."""
        self.lengths.append(0)
        queue = LayerQueue(self.per_prompt.keep)
        self.sequences.append(CachedSequence([[] for _ in range(self.spec.num_layers)], self.sizes.pages(tokens), queue))
        return len(self.lengths) - 1

    def reserve(self, slot: int, tokens: int) -> None:
        """Take pages until the sequence has enough for `tokens` tokens in all layers."""
        sequence = self.sequences[slot]
        for layer in range(self.spec.num_layers):
            self._take(sequence.pages[layer], self._places(sequence, layer, tokens))

    def missing_pages(self, slot: int, tokens: int) -> int:
        """The number of pages that the sequence still needs for `tokens` tokens."""
        sequence = self.sequences[slot]
        return sum(
            max(0, pages_for(self._places(sequence, layer, tokens)) - len(pages)) for layer, pages in enumerate(sequence.pages)
        )

    def release(self, slot: int) -> int:
        """Free a sequence's slot and pages. The sequence of the last slot moves into the slot; returns the slot it moved from."""
        for pages in self.sequences[slot].pages:
            self._free_after(pages, 0)
        last = len(self.lengths) - 1
        self.lengths[slot], self.sequences[slot] = self.lengths[last], self.sequences[last]
        self.lengths.pop()
        self.sequences.pop()
        return last

    def write_prompt(self, slot: int, layer: int, k_GKD: Tensor, v_GKD: Tensor, lazy_ratio: float) -> None:
        """Cache a layer's keys and values of a complete prompt; the layer that leaves the queue keeps sinks and latest tokens only.

        The layers of a prompt come in order, each once.
        """
        sequence, tokens = self.sequences[slot], k_GKD.shape[1]
        leaving = sequence.queue.add(layer, lazy_ratio)
        if leaving is not None and leaving != layer:
            self._cut(sequence.pages[leaving], tokens)
        pages = sequence.pages[layer]
        self._take(pages, self._places(sequence, layer, tokens))
        position_K = self._in_window(tokens) if layer in sequence.streaming else torch.arange(tokens, device=self.keys.device)
        self._write(pages, position_K, k_GKD[:, position_K], v_GKD[:, position_K], layer in sequence.streaming)

    def _cut(self, pages: list[int], tokens: int) -> None:
        if tokens <= self.spec.window:
            return
        position_K = self._in_window(tokens)
        page_K = torch.tensor(pages, device=self.keys.device)[position_K // PAGE]
        k_GKD, v_GKD = (x[page_K, :, position_K % PAGE].transpose(0, 1) for x in (self.keys, self.values))
        self._free_after(pages, pages_for(self.spec.window))
        self._write(pages, position_K, k_GKD, v_GKD, streams=True)

    def _write(self, pages: list[int], position_K: Tensor, k_GKD: Tensor, v_GKD: Tensor, streams: bool) -> None:
        place_K = slot_of(position_K, self.spec.w_sink, self.spec.w_recent) if streams else position_K
        page_K = torch.tensor(pages, device=self.keys.device)[place_K // PAGE]
        self.keys[page_K, :, place_K % PAGE] = k_GKD.transpose(0, 1)
        self.values[page_K, :, place_K % PAGE] = v_GKD.transpose(0, 1)

    def _in_window(self, tokens: int) -> Tensor:
        """The positions that a streaming layer keeps of a prompt."""
        position_T = torch.arange(tokens, device=self.keys.device)
        return position_T[(position_T < self.spec.w_sink) | (position_T >= tokens - self.spec.w_recent)]

    def _places(self, sequence: CachedSequence, layer: int, tokens: int) -> int:
        return min(tokens, self.spec.window) if layer in sequence.streaming else tokens

    def _take(self, pages: list[int], places: int) -> None:
        while len(pages) < pages_for(places):
            pages.append(heapq.heappop(self._free))

    def _free_after(self, pages: list[int], kept: int) -> None:
        for page in pages[kept:]:
            heapq.heappush(self._free, page)
        del pages[kept:]
