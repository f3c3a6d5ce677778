"""The KV cache of `generate()` where each prompt of a batch chooses the layers that stream in its answer.

Each row has a cache of its own in each layer, without padding. While the prompts are read, the layer that leaves a row's queue is
reduced to sinks and window at once, so a row never holds more than `keep` layers in full.

Shapes: B rows, H query heads, G key/value heads, T tokens of a prompt, D head size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lt_train.hybrid.cache import GrowingLayer, HybridCache, Rows, SinkRingLayer
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.hybrid.views import AttentionView, FullView, LayerViews
from lt_train.inference.fused_attention import full_attention
from lt_train.inference.lazy_ratio import lazy_ratio
from lt_train.inference.per_prompt import LayerQueue, PerPrompt


def choose_per_prompt(model: HybridForCausalLM, per_prompt: PerPrompt) -> None:
    """Let each prompt choose its layers in `generate()` and in forward passes with a cache from now on.

    Raises:
        UserError: see `PerPrompt.check`.
    """
    per_prompt.check(model)
    model.model.cache_of_prompts = partial(PerPromptCache, model.spec, per_prompt)


class PromptsLayer(CacheLayerMixin):
    """One layer: a `GrowingLayer` for each row in which it is full, a `SinkRingLayer` for each in which it streams."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[GrowingLayer | SinkRingLayer] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the view of the forward pass caches them, which also sees the queries."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        return max((part.get_seq_length() for part in self.parts), default=0)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise HybridError("cache: transformers' masks ignore sinks. Fix: use this cache with the hybrid classes only")


class PerPromptCache(HybridCache):
    """The cache of one batch of prompts and their answers.

    Attributes:
        queues: which layers stream, by row.
        tokens: the cached tokens of each row, by itself.
    """

    layers: list[PromptsLayer]

    def __init__(self, spec: HybridSpec, per_prompt: PerPrompt) -> None:
        super().__init__(spec)
        self.per_prompt = per_prompt
        self.queues: list[LayerQueue] = []
        self.tokens: list[Rows] = []

    def _layer(self, layer: int) -> PromptsLayer:
        return PromptsLayer()

    def reset(self) -> None:
        super().reset()
        self.queues, self.tokens = [], []
        for layer in self.layers:
            layer.parts = []

    def view_of_pass(self, view: AttentionView) -> AttentionView:
        """
        Raises:
            HybridError: several tokens after the prompt, or a row without any.
        """
        device = self.rows.after_B.device
        if not self.tokens:
            lengths = self.rows.after_B.tolist()
            if 0 in lengths:
                row = lengths.index(0)
                raise HybridError(f"attention_mask: it hides every token of row {row}. Fix: leave the row out, or show its tokens")
            self.tokens = [Rows() for _ in lengths]
            self.queues = [LayerQueue(self.per_prompt.keep) for _ in lengths]
            for tokens, length in zip(self.tokens, lengths, strict=True):
                tokens.advance(None, 1, length, device)
            assert isinstance(view, LayerViews) and isinstance(view.views.full, FullView), "a prompt is the first pass of a cache"
            return PromptRowsView(self, view.views.full)
        if self.rows.new > 1:
            raise HybridError(
                f"cache: {self.rows.new} new tokens after a prompt: its last queries decided which layers stream, and these have "
                "dropped tokens since. Fix: pass a prompt in one forward pass, without prefill_chunk_size, and a new prompt "
                "without the cache of an earlier one"
            )
        for tokens in self.tokens:
            tokens.advance(None, 1, 1, device)
        return AnswerRowsView(self)

    def write_prompt(self, row: int, layer: int, k_1GTD: Tensor, v_1GTD: Tensor, ratio: float) -> None:
        """Cache a layer's keys and values of a row's prompt; the layer that leaves the queue keeps sinks and latest tokens only."""
        leaving, parts = self.queues[row].add(layer, ratio), self.layers[layer].parts
        if leaving == layer:
            parts.append(self._cut(row, k_1GTD, v_1GTD))
            return
        if leaving is not None:
            others = self.layers[leaving].parts
            others[row] = self._cut(row, others[row].keys, others[row].values)
        parts.append(GrowingLayer())
        parts[row].update(k_1GTD, v_1GTD)

    def _cut(self, row: int, k_1GTD: Tensor, v_1GTD: Tensor) -> SinkRingLayer:
        ring = SinkRingLayer(self.spec.w_sink, self.spec.w_recent, self.tokens[row])
        ring.update(k_1GTD, v_1GTD)
        return ring


class PromptRowsView(AttentionView):
    """Whole prompts, left-padded: full attention in every layer; the lazy ratios of each row decide what is cached of it."""

    def __init__(self, cache: PerPromptCache, inner: FullView) -> None:
        """inner: the hybrid's own view of a full layer in this pass."""
        self.cache = cache
        self.inner = inner

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scaling: float, dropout: float) -> Tensor:
        cache, spec, columns = self.cache, self.cache.spec, k_BGTD.shape[2]
        out_BTHD, lses = full_attention(self.inner, module, q_BHTD, k_BGTD, v_BGTD, scaling, dropout)
        for row, (tokens, lse_1HT) in enumerate(zip(cache.tokens, lses, strict=True)):
            q_1HTD, k_1GTD, v_1GTD = (x[row : row + 1, :, columns - tokens.columns :] for x in (q_BHTD, k_BGTD, v_BGTD))
            ratio = lazy_ratio(q_1HTD, k_1GTD, scaling, spec.w_sink, spec.w_recent, cache.per_prompt.w_last, lse_BHT=lse_1HT)
            cache.write_prompt(row, module.layer_idx, k_1GTD, v_1GTD, ratio)
        return out_BTHD


class AnswerRowsView(AttentionView):
    """One new token of every row: it sees what the row's own cache holds, all of it."""

    def __init__(self, cache: PerPromptCache) -> None:
        self.cache = cache

    def attend(self, module: nn.Module, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, scaling: float, dropout: float) -> Tensor:
        of_rows = zip(q_BH1D.split(1), k_BG1D.split(1), v_BG1D.split(1), self.cache.layers[module.layer_idx].parts, strict=True)
        out = []
        for q_1H1D, k_1G1D, v_1G1D, part in of_rows:
            seen = part.update(k_1G1D, v_1G1D)
            out += sdpa_attention_forward(module, q_1H1D, *seen, None, dropout=dropout, scaling=scaling, is_causal=False)[:1]
        return torch.cat(out)
