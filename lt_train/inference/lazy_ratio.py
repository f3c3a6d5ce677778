"""The lazy ratio of a layer: LightTransfer's score (arXiv 2410.13846, Eq. 1) of where the last queries of an input attend.

Only the [w_last, T] logits of one group of query heads are in memory at a time, and two log-sum-exps over them give the ratio.

Shapes: B = 1, H query heads, G key/value heads, R = H / G, W last queries, T tokens, K keys that some of them see when the layer
streams, D head size.
"""

import torch
from torch import Tensor

from lt_train.hybrid.mask import full_visible, streaming_visible


def lazy_ratio(q_BHTD: Tensor, k_BGTD: Tensor, scaling: float, w_sink: int, w_recent: int, w_last: int) -> float:
    """Eq. 1 for one layer and one input, averaged over heads and the last `w_last` queries, or all if there are fewer.

    The ratio of a query is its attention probability on the keys that it would see if the layer streamed; so its recent
    keys are its own latest `w_recent`. Eq. 1 uses the input's last `w_recent` keys for all queries: the same for the
    last query, and up to `w_last - 1` keys fewer for the earlier ones.

    Args:
        q_BHTD, k_BGTD: queries and keys after rotary embedding, B = 1.
    """
    groups, length = k_BGTD.shape[1:3]
    position_T = torch.arange(length, device=k_BGTD.device)
    query_W1 = position_T[-w_last:, None]
    first_recent = max(length - query_W1.shape[0] - w_recent + 1, 0)
    near_T = (position_T < w_sink) | (position_T >= first_recent)
    unseen_WT = ~full_visible(query_W1, position_T)
    unseen_WK = ~streaming_visible(query_W1, position_T[near_T], w_sink, w_recent)
    q_GRWD = q_BHTD[0, :, -w_last:].unflatten(0, (groups, -1)).float()
    total = torch.zeros((), dtype=torch.float64, device=q_GRWD.device)
    for q_RWD, k_TD in zip(q_GRWD, k_BGTD[0], strict=True):
        logits_RWT = (scaling * q_RWD) @ k_TD.float().T
        near_RWK = logits_RWT[:, :, near_T].masked_fill_(unseen_WK, float("-inf"))
        log_ratio_RW = near_RWK.logsumexp(-1) - logits_RWT.masked_fill_(unseen_WT, float("-inf")).logsumexp(-1)
        total += log_ratio_RW.exp().double().sum()  # Eq. 1 averages probabilities over heads, not their logarithms
    return total.item() / (q_BHTD.shape[1] * query_W1.shape[0])
