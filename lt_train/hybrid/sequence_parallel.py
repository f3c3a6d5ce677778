"""Attention over a sequence of which each process holds a slice (Ulysses sequence parallelism, arXiv 2309.14509).

Around each layer's attention an exchange turns slices of the sequence with all heads into the whole sequence with a share of the
heads, and back. Nothing else of a decoder layer looks beyond its own token. Where documents begin is read off the gathered
`position_ids` alone: a slice may begin in the middle of one.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size, all of this process; S processes share a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .spec import HybridError
from .views import AttentionView, Views

Exchange = Callable[..., tuple[Tensor, Any]]
"""Calls `attend_gathered` with the sequence gathered and the heads shared out, and brings its output back.

(module, q_BHTD, k_BGTD, v_BGTD, view, position_ids=[B, T], scaling=, dropout=) -> ([B, T, H * D], anything).
DeepSpeed's `UlyssesSPAttentionHF(attn=attend_gathered, …).forward` is one."""


class GatheredSequence:
    """What is found out about the whole sequence, once in a forward pass: at the first layer, for all of them."""

    def __init__(self, find_views: Callable[[Tensor], Views]) -> None:
        self.find_views = find_views
        self.found: Views | None = None

    def views(self, position_ids: Tensor) -> Views:
        """position_ids: [B, S * T], gathered; the same at every layer."""
        if self.found is None:
            self.found = self.find_views(position_ids)
        return self.found


@dataclass(frozen=True)
class SharedView(AttentionView):
    """What a layer's queries see, where queries and keys are a slice of the sequence each."""

    sequence: GatheredSequence
    streaming: bool
    exchange: Exchange
    position_ids: Tensor  # [B, T] of the slice

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        out, _ = self.exchange(
            module, q_BHTD, k_BGKD, v_BGKD, self, position_ids=self.position_ids, scaling=scaling, dropout=dropout
        )
        return out.unflatten(-1, (q_BHTD.shape[1], -1))

    def gathered(self, position_ids: Tensor) -> AttentionView:
        views = self.sequence.views(position_ids)
        return views.streaming if self.streaming else views.full


def attend_gathered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SharedView,
    *,
    position_ids: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """The attention inside an exchange: query [B, H / S, S * T, D], position_ids [B, S * T] -> [B, S * T, H / S, D]."""
    return attention_mask.gathered(position_ids).attend(module, query, key, value, scaling, dropout), None


def shared_views(
    exchange: Exchange,
    find_views: Callable[[Tensor], Views],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Views:
    """The views of one process's slice.

    Args:
        find_views: what full and streaming layers see of a whole sequence, from its position_ids [B, S * T].
        position_ids: [B, T], each token's position in its own document, as counted in the whole sequence.

    Raises:
        HybridError: no position_ids, or a padding mask, which is not gathered: padding is told by position 0, as a document of
            one token.
    """
    if position_ids is None:
        raise HybridError("a slice of a sequence needs position_ids: each token's position in its own document")
    if attention_mask is not None:
        raise HybridError("a slice of a sequence takes no attention_mask: only position_ids are gathered. Give padding position 0")
    sequence = GatheredSequence(find_views)
    return Views(
        full=SharedView(sequence, False, exchange, position_ids),
        streaming=SharedView(sequence, True, exchange, position_ids),
        position_ids=position_ids,
    )
