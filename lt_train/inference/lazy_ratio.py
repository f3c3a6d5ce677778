"""The lazy ratio of a layer: LightTransfer's score (arXiv 2410.13846, Eq. 1) of where the last queries of an input attend.

Only the keys that a query would see if the layer streamed are scored, where the attention's kernel returned log-sum-exps.

Shapes: B = 1, H query heads, G key/value heads, W last queries, N queries of the H / G heads of a KV head, T tokens, K keys of a
block, S keys that some of the queries would see, C of them recent to some only, D head size.
"""

import torch
from torch import Tensor

from lt_train.hybrid.mask import full_visible, streaming_visible

BLOCK = 1024
"""Keys of one product: on a CPU the logits are still in its cache when they are added up."""


@torch.no_grad()
def lazy_ratio(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    scaling: float,
    w_sink: int,
    w_recent: int,
    w_last: int,
    sinks_H: Tensor | None = None,
    lse_BHT: Tensor | None = None,
) -> float:
    """Eq. 1 for one layer and one input, averaged over heads and the last `w_last` queries, or all if there are fewer.

    1 exactly for an input within the window.

    The ratio of a query is its attention probability on the keys that it would see if the layer streamed; so its recent
    keys are its own latest `w_recent`. Eq. 1 uses the input's last `w_recent` keys for all queries: the same for the
    last query, and up to `w_last - 1` keys fewer for the earlier ones.

    Args:
        q_BHTD, k_BGTD: queries and keys after rotary embedding, B = 1.
        sinks_H: learned sinks of the base, which a streaming layer keeps: what they attract counts as seen.
        lse_BHT: the natural logarithm of each query's sum of exp(scores) in full attention, sinks included; None: computed here.
    """
    groups, length = k_BGTD.shape[1:3]
    if length <= w_sink + w_recent:
        return 1.0
    queries, heads = min(w_last, length), q_BHTD.shape[1] // groups
    position_T = torch.arange(length, device=k_BGTD.device)
    query_W1 = position_T[-queries:, None]
    to_some, to_all = max(w_sink, length - queries - w_recent + 1), length - w_recent + 1
    passed_NC = ~streaming_visible(query_W1, position_T[to_some:to_all], w_sink, w_recent).repeat(heads, 1)
    later_NW = ~full_visible(query_W1, position_T[-queries:]).repeat(heads, 1)
    q_GND = scaling * q_BHTD[0, :, -queries:].float().unflatten(0, (groups, heads)).flatten(1, 2)
    sinks_GN = None if sinks_H is None else sinks_H.float().unflatten(0, (groups, heads)).repeat_interleave(queries, 1)
    if lse_BHT is None:
        lse_GN = _log_sum_exps(q_GND, k_BGTD[0], later_NW, sinks_GN)
    else:
        lse_GN = lse_BHT[0, :, -queries:].float().unflatten(0, (groups, heads)).flatten(1, 2)
    total = torch.zeros((), dtype=torch.float64, device=q_GND.device)
    probability_NS = q_GND.new_empty(heads * queries, w_sink + length - to_some)
    for q_ND, k_TD, lse_N in zip(q_GND, k_BGTD[0], lse_GN, strict=True):
        k_SD = torch.cat([k_TD[:w_sink], k_TD[to_some:]]).float()
        torch.mm(q_ND, k_SD.T, out=probability_NS).sub_(lse_N[:, None]).exp_()
        probability_NS[:, w_sink : w_sink + to_all - to_some].masked_fill_(passed_NC, 0)
        probability_NS[:, -queries:].masked_fill_(later_NW, 0)
        total += probability_NS.sum(-1).sum(dtype=torch.float64)
    if sinks_GN is not None:
        total += (sinks_GN - lse_GN).exp().sum(dtype=torch.float64)
    ratio = total.item() / (q_BHTD.shape[1] * queries)
    return 1.0 if ratio > 1 else ratio  # by rounding; NaN stays NaN


def _log_sum_exps(q_GND: Tensor, k_GTD: Tensor, later_NW: Tensor, sinks_GN: Tensor | None) -> Tensor:
    """lse_GN of the full attention of the last W tokens. later_NW: which of these keys come after each query."""
    queries, lses = later_NW.shape[1], []
    for q_ND, k_TD in zip(q_GND, k_GTD, strict=True):
        own_NW = (q_ND @ k_TD[-queries:].float().T).masked_fill_(later_NW, float("-inf"))
        of_blocks = [own_NW.logsumexp(-1), *((q_ND @ k_KD.float().T).logsumexp(-1) for k_KD in k_TD[:-queries].split(BLOCK))]
        lses.append(torch.stack(of_blocks).logsumexp(0))
    lse_GN = torch.stack(lses)
    return lse_GN if sinks_GN is None else lse_GN.logaddexp(sinks_GN)
