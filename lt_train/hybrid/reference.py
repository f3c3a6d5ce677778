"""Attention by its definition: a softmax under the visibility predicate. Slow; every fast kernel is tested against it.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size.
"""

import torch
from torch import Tensor

from .learned_sinks import softmax_with_sinks
from .mask import streaming_visible


def masked_attention(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible_BQK: Tensor, scaling: float, sinks_H: Tensor | None = None
) -> Tensor:
    """softmax(scaling * q k^T where visible) v, computed in fp32 or better. Returns out_BHQD in the inputs' dtype.

    `visible_BQK` may have batch 1. Each query must see at least one key. `sinks_H`: learned sinks.
    """
    groups = q_BHQD.shape[1] // k_BGKD.shape[1]
    precise = torch.promote_types(q_BHQD.dtype, torch.float32)
    with torch.autocast(q_BHQD.device.type, enabled=False):
        k_BHKD = k_BGKD.to(precise).repeat_interleave(groups, dim=1)
        v_BHKD = v_BGKD.to(precise).repeat_interleave(groups, dim=1)
        scores_BHQK = scaling * (q_BHQD.to(precise) @ k_BHKD.transpose(-1, -2))
        scores_BHQK = scores_BHQK.masked_fill(~visible_BQK[:, None], float("-inf"))
        sinks_H1 = None if sinks_H is None else sinks_H[:, None]
        return (softmax_with_sinks(scores_BHQK, sinks_H1) @ v_BHKD).to(q_BHQD.dtype)


def reference_streaming_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    w_sink: int,
    w_recent: int,
    scaling: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Streaming attention over rows that are one document each, by a dense mask: quadratic in length."""
    position_T = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
    visible_BTT = streaming_visible(position_T[:, None], position_T[None, :], w_sink, w_recent)[None]
    return masked_attention(q_BHTD, k_BGTD, v_BGTD, visible_BTT, scaling, sinks_H)
