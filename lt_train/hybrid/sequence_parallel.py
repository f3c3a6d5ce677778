"""Attention over a sequence of which each process holds a shard (Ulysses sequence parallelism, arXiv 2309.14509).

Around each layer's attention an all-to-all exchange turns shards of the sequence with all heads into the entire sequence with a
fraction of the heads, and back. The rest of a decoder layer computes each token by itself. Documents are found from the gathered
`position_ids`, because a shard may begin in the middle of one.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size, all of this process; S processes hold a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .spec import HybridError, HybridSpec
from .views import AttentionView

Exchange = Callable[..., tuple[Tensor, Any]]
"""An all-to-all around `attend_gathered`: gathers the sequence, distributes the heads, and reverses both for the output.

(module, q_BHTD, k_BGTD, v_BGTD, view, position_ids=[B, T], scaling=, dropout=) -> ([B, T, H * D], anything).
DeepSpeed's `UlyssesSPAttentionHF(attn=attend_gathered, …).forward` is one."""


@dataclass(frozen=True)
class Shards:
    """The processes that hold the shards of a sequence: their exchange, the index of this one among them, and their number."""

    exchange: Exchange
    index: int
    degree: int

    def spec_of_process(self, spec: HybridSpec, kv_heads: int) -> HybridSpec:
        """The spec of the KV heads that this process computes: an equal part of `kv_heads`, in their order, or one of them."""
        first, count = self.index * kv_heads // self.degree, max(1, kv_heads // self.degree)
        heads_L = [[head - first for head in heads if first <= head < first + count] for heads in spec.streaming_heads(kv_heads)]
        return HybridSpec.from_streaming_heads(heads_L, count, spec.w_sink, spec.w_recent).on(spec)


class ShardedView(AttentionView):
    """What the queries of each layer see, where queries and keys are a shard of the sequence each.

    The views of the entire sequence are found once in a forward pass: by the first layer, for all layers.
    """

    def __init__(self, exchange: Exchange, find_views: Callable[[Tensor], AttentionView], position_ids: Tensor) -> None:
        self.exchange = exchange
        self.find_views = find_views
        self.position_ids = position_ids  # [B, T] of the shard
        self.found: AttentionView | None = None

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        out, _ = self.exchange(
            module, q_BHTD, k_BGKD, v_BGKD, self, position_ids=self.position_ids, scaling=scaling, dropout=dropout
        )
        return out.unflatten(-1, (q_BHTD.shape[1], -1))

    def gathered(self, position_ids: Tensor) -> AttentionView:
        """position_ids: [B, S * T], gathered; the same at every layer."""
        if self.found is None:
            self.found = self.find_views(position_ids)
        return self.found


def attend_gathered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ShardedView,
    *,
    position_ids: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """The attention inside an exchange: query [B, H / S, S * T, D], position_ids [B, S * T] -> [B, S * T, H / S, D]."""
    return attention_mask.gathered(position_ids).attend(module, query, key, value, scaling, dropout), None


def sharded_view(
    exchange: Exchange,
    find_views: Callable[[Tensor], AttentionView],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> ShardedView:
    """The view of one process's shard, for all layers.

    Args:
        find_views: what the layers see of an entire sequence by this process's heads, from its position_ids [B, S * T].
        position_ids: [B, T], each token's position in its own document, as counted in the entire sequence.

    Raises:
        HybridError: no position_ids, or a padding mask, which is not gathered. Padding has position 0: a document of one token.
    """
    if position_ids is None:
        raise HybridError("position_ids: missing for a shard of a sequence. Fix: pass each token's position in its own document")
    if attention_mask is not None:
        raise HybridError(
            "attention_mask: a shard of a sequence takes none, because only position_ids are gathered. "
            "Fix: leave it out and give padding position 0"
        )
    return ShardedView(exchange, find_views, position_ids)
