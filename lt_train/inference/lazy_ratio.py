"""The lazy ratio of a layer: LightTransfer's score (arXiv 2410.13846, Eq. 1) of where the last queries of an input attend.

Only the [w_last, T] probabilities of one group of query heads are in memory at a time.

Shapes: B = 1, H query heads, G key/value heads, R = H / G, W last queries, T tokens, K tokens that are recent
to one of them, D head size.
"""

import torch
from torch import Tensor

from lt_train.hybrid.learned_sinks import softmax_with_sinks
from lt_train.hybrid.mask import full_visible, streaming_visible


def lazy_ratio(
    q_BHTD: Tensor, k_BGTD: Tensor, scaling: float, w_sink: int, w_recent: int, w_last: int, sinks_H: Tensor | None = None
) -> float:
    """Eq. 1 for one layer and one input, averaged over heads and the last `w_last` queries, or all if there are fewer.

    1 exactly for an input within the window.

    The ratio of a query is its attention probability on the keys that it would see if the layer streamed; so its recent
    keys are its own latest `w_recent`. Eq. 1 uses the input's last `w_recent` keys for all queries: the same for the
    last query, and up to `w_last - 1` keys fewer for the earlier ones.

    Args:
        q_BHTD, k_BGTD: queries and keys after rotary embedding, B = 1.
        sinks_H: learned sinks of the base, which a streaming layer keeps: what they attract counts as seen.
    """
    groups, length = k_BGTD.shape[1:3]
    if length <= w_sink + w_recent:
        return 1.0
    position_T = torch.arange(length, device=k_BGTD.device)
    query_W1 = position_T[-w_last:, None]
    queries = query_W1.shape[0]
    first_recent = max(w_sink, length - queries - w_recent + 1)
    later_WW = ~full_visible(query_W1, position_T[-queries:])
    recent_WK = streaming_visible(query_W1, position_T[first_recent:], w_sink, w_recent).float()
    q_GRWD = scaling * q_BHTD[0, :, -queries:].unflatten(0, (groups, -1)).float()
    total = torch.zeros((), dtype=torch.float64, device=q_GRWD.device)
    sinks_GR1 = [None] * groups if sinks_H is None else sinks_H.view(groups, -1, 1)
    for q_RWD, k_TD, sinks_R1 in zip(q_GRWD, k_BGTD[0], sinks_GR1, strict=True):
        logits_RWT = q_RWD @ k_TD.float().T
        logits_RWT[:, :, -queries:].masked_fill_(later_WW, float("-inf"))
        probability_RWT = softmax_with_sinks(logits_RWT, sinks_R1)
        recent_RW = torch.einsum("rwk,wk->rw", probability_RWT[:, :, first_recent:], recent_WK)
        on_sinks_RW = probability_RWT[:, :, :w_sink].sum(-1)
        if sinks_R1 is not None:
            on_sinks_RW += 1 - probability_RWT.sum(-1)
        total += (on_sinks_RW + recent_RW).double().sum()
    return total.item() / (q_BHTD.shape[1] * queries)
