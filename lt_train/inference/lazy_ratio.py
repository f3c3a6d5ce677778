"""The lazy ratio of a layer: LightTransfer's score (arXiv 2410.13846, Eq. 1) of where the last queries of an input attend.

The last queries of the query heads that share a KV head meet its keys in one product, in buffers that all KV heads use. What is
then added up are probabilities of sinks and recent keys, and a mask is needed only where these differ between the queries.

Shapes: B = 1, H query heads, G key/value heads, W last queries, N queries of the H / G heads of a KV head, T tokens, K keys of a
block, or recent to some of the queries only, D head size.
"""

import torch
from torch import Tensor

from lt_train.hybrid.mask import full_visible, streaming_visible

BLOCK = 1024
"""Keys of one product: on a CPU the logits are still in its cache when they are stored."""


@torch.no_grad()
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
    queries, heads = min(w_last, length), q_BHTD.shape[1] // groups
    position_T = torch.arange(length, device=k_BGTD.device)
    query_W1 = position_T[-queries:, None]
    later_NW = ~full_visible(query_W1, position_T[-queries:]).repeat(heads, 1)
    to_some, to_all = max(w_sink, length - queries - w_recent + 1), length - w_recent + 1
    recent_NK = streaming_visible(query_W1, position_T[to_some:to_all], w_sink, w_recent).repeat(heads, 1)
    q_GND = scaling * q_BHTD[0, :, -queries:].float().unflatten(0, (groups, heads)).flatten(1, 2)
    width = length if sinks_H is None else length + 1  # the sink of a query head, as one more key that each query sees
    logits_NT = q_GND.new_empty(heads * queries, width)
    probability_NT = torch.empty_like(logits_NT)
    total = torch.zeros((), dtype=torch.float64, device=q_GND.device)
    for group, (q_ND, k_TD) in enumerate(zip(q_GND, k_BGTD[0], strict=True)):
        for k_KD, logits_NK in zip(k_TD.split(BLOCK), logits_NT[:, :length].split(BLOCK, dim=1), strict=True):
            torch.mm(q_ND, k_KD.float().T, out=logits_NK)
        logits_NT[:, length - queries : length].masked_fill_(later_NW, float("-inf"))
        if sinks_H is not None:
            logits_NT[:, length] = sinks_H.unflatten(0, (groups, heads))[group].repeat_interleave(queries)
        torch.softmax(logits_NT, dim=-1, out=probability_NT)
        total += probability_NT[:, :w_sink].sum(dtype=torch.float64)
        total += (probability_NT[:, to_some:to_all] * recent_NK).sum(dtype=torch.float64)
        total += probability_NT[:, to_all:].sum(dim=-1).sum(dtype=torch.float64)
    return total.item() / (q_BHTD.shape[1] * queries)
