"""Views: what the queries of one layer see in one forward pass. A decoder layer gets a view as its attention mask.

Shapes: B rows, H query heads, G key/value heads, T new columns, K keys (cached and new), D head size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_kernels import AUTO, computed_in, kernel_for
from .cache import HybridCache, slot_positions
from .documents import Documents
from .learned_sinks import sdpa_with_sinks, sinks_of, sinks_of_base
from .mask import at_least_one, full_visible, streaming_visible
from .spec import HybridError, HybridSpec


class AttentionView:
    """Defines what a layer's queries see, and computes their attention."""

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        """Attention of queries and keys after rotary embedding; with a cache, keys and values come from it. Returns out_BTHD."""
        raise NotImplementedError


@dataclass
class FullView(AttentionView):
    """Full causal attention within each document, without a cache."""

    documents: Documents
    kernel: str = AUTO

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        dtype, sinks_H = computed_in(v_BGKD), sinks_of_base(module, q_BHTD)
        kernel = kernel_for(self.kernel, q_BHTD, dtype)
        qkv = (x.to(dtype) for x in (q_BHTD, k_BGKD, v_BGKD))
        if sinks_H is not None:
            refuse_dropout(dropout)
            everything = {"w_sink": 0, "w_recent": max(self.documents.lengths)}
            return kernel.streaming(self.documents, *qkv, **everything, scaling=scaling, sinks_H=sinks_H).transpose(1, 2)
        if kernel.full is not None and not dropout:
            return kernel.full(self.documents, *qkv, scaling=scaling).transpose(1, 2)

        def one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling)[0].transpose(1, 2)

        return self.documents.attend(one_document, q_BHTD, k_BGKD, v_BGKD).transpose(1, 2)


@dataclass
class StreamingView(AttentionView):
    """Streaming attention within each document, without a cache."""

    documents: Documents
    spec: HybridSpec
    kernel: str = AUTO

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        refuse_dropout(dropout)
        dtype = computed_in(v_BGKD)
        kernel = kernel_for(self.kernel, q_BHTD, dtype)
        qkv = (x.to(dtype) for x in (q_BHTD, k_BGKD, v_BGKD))
        sizes = {"w_sink": self.spec.w_sink, "w_recent": self.spec.w_recent}
        sinks_H = sinks_of(module, self.spec, q_BHTD)
        return kernel.streaming(self.documents, *qkv, **sizes, scaling=scaling, sinks_H=sinks_H).transpose(1, 2)


class CachedView(AttentionView):
    """New columns after cached ones: a mask over the keys that the cache returns, made once for all layers of a kind."""

    def __init__(self, cache: HybridCache) -> None:
        self.cache = cache

    @cached_property
    def visible_BTK(self) -> Tensor | None:
        """The mask of visible keys; None where every query sees every key."""
        raise NotImplementedError

    def sinks_of(self, module: nn.Module, q_BHTD: Tensor) -> Tensor | None:
        return sinks_of_base(module, q_BHTD)

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        sinks_H = self.sinks_of(module, q_BHTD)
        if sinks_H is not None:
            refuse_dropout(dropout)
            return sdpa_with_sinks(q_BHTD, k_BGKD, v_BGKD, self.visible_BTK, sinks_H, scaling).transpose(1, 2)
        mask = None if self.visible_BTK is None else self.visible_BTK[:, None].to(q_BHTD.device)
        return sdpa_attention_forward(module, q_BHTD, k_BGKD, v_BGKD, mask, dropout=dropout, scaling=scaling, is_causal=False)[0]


class CachedFullView(CachedView):
    @cached_property
    def visible_BTK(self) -> Tensor | None:
        rows = self.cache.rows
        if rows.new == 1 and rows.shortest == rows.columns:
            return None
        column_K = torch.arange(rows.columns, device=rows.after_B.device)
        k_positions_BK = column_K - rows.padding_B[:, None]
        return at_least_one(full_visible(rows.new_positions_BT[:, :, None], k_positions_BK[:, None, :]))


class CachedStreamingView(CachedView):
    def __init__(self, cache: HybridCache, spec: HybridSpec) -> None:
        """spec: the sizes of the layers that get this view."""
        super().__init__(cache)
        self.spec = spec

    def sinks_of(self, module: nn.Module, q_BHTD: Tensor) -> Tensor | None:
        return sinks_of(module, self.spec, q_BHTD)

    @cached_property
    def visible_BTK(self) -> Tensor | None:
        rows, spec = self.cache.rows, self.spec
        slots = min(rows.longest, spec.window)
        if rows.new == 1:
            if rows.shortest >= slots:
                return None
            k_positions_BK = slot_positions(rows.after_B, slots, spec.w_sink, spec.w_recent)
        else:
            held = min(int(rows.before_B.max()), spec.window)
            held_BK = slot_positions(rows.before_B, held, spec.w_sink, spec.w_recent)
            k_positions_BK = torch.cat([held_BK, rows.new_positions_BT], dim=1)
        q_positions_BT1 = rows.new_positions_BT[:, :, None]
        return at_least_one(streaming_visible(q_positions_BT1, k_positions_BK[:, None, :], spec.w_sink, spec.w_recent))


@dataclass(frozen=True)
class SplitView(AttentionView):
    """A split layer: `streaming_heads` are its KV heads that stream, and the others keep full attention.

    Heads are in the order of the base's weights, and are copied apart here; docs/code.md has the cost.

    Args:
        cache: if given, keys and values are new ones, which this view stores in the parts of the layer's `SplitLayer`.
    """

    full: AttentionView
    streaming: AttentionView
    streaming_heads: tuple[int, ...]
    cache: HybridCache | None = None

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        kv_heads = k_BGKD.shape[1]
        full_heads = tuple(head for head in range(kv_heads) if head not in self.streaming_heads)
        kinds = (full_heads, self.streaming_heads)
        (q, streaming_q), (k, streaming_k), (v, streaming_v) = (_by_kind(x, kv_heads, kinds) for x in (q_BHTD, k_BGKD, v_BGKD))
        if self.cache is not None:
            layer = self.cache.layers[module.layer_idx]
            k, v = layer.full.update(k, v)
            streaming_k, streaming_v = layer.streaming.update(streaming_k, streaming_v)
        outs = (
            self.full.attend(module, q, k, v, scaling, dropout),
            self.streaming.attend(module, streaming_q, streaming_k, streaming_v, scaling, dropout),
        )
        of_head: dict[int, Tensor] = {}
        for heads, out_BTHD in zip(kinds, outs, strict=True):
            of_head |= zip(heads, out_BTHD.chunk(len(heads), dim=2), strict=True)
        return torch.cat([of_head[head] for head in range(kv_heads)], dim=2)


def _by_kind(x_BHTD: Tensor, kv_heads: int, kinds: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """The KV heads of each kind, with their query heads. By chunks, whose gradients are joined by one copy, unlike an index's."""
    of_head = x_BHTD.chunk(kv_heads, dim=1)
    return [torch.cat([of_head[head] for head in heads], dim=1) for heads in kinds]


@dataclass(frozen=True)
class Views:
    """The views of full, streaming and sliding layers in one forward pass, and the positions [B, T] for the rotary embedding.

    Args:
        sliding: None where no layer slides.
        cache: that of the forward pass, of which split layers need to know.
    """

    full: AttentionView
    streaming: AttentionView
    position_ids: Tensor
    cache: HybridCache | None = None
    sliding: AttentionView | None = None

    def of_layer(self, layer: int, spec: HybridSpec) -> AttentionView:
        if spec.slides(layer):
            assert self.sliding is not None, "the views are made for a model with sliding layers"
            return self.sliding
        if spec.is_lazy(layer):
            return self.streaming
        heads = spec.split_heads(layer)
        return SplitView(self.full, self.streaming, heads, self.cache) if heads else self.full


@dataclass(frozen=True)
class LayerViews(AttentionView):
    """One view for all layers: by the `layer_idx` of its attention module, each layer gets that of its kind."""

    views: Views
    spec: HybridSpec

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        view = self.views.of_layer(module.layer_idx, self.spec)
        return view.attend(module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)


def refuse_dropout(dropout: float) -> None:
    if dropout:
        raise HybridError(
            f"attention_dropout: {dropout}: the streaming kernels have no dropout. Fix: set it to 0 in the model's config"
        )
