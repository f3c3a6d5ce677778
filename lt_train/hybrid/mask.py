"""The one definition of what a query sees. Every kernel, cache and engine is tested against it.

Shapes: B batch, Q queries, K keys.
"""

import torch
from torch import Tensor


def full_visible(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Full causal attention: a query sees a key iff the key is real (position >= 0) and not later than the query."""
    return (k_positions >= 0) & (k_positions <= q_positions)


def streaming_visible(q_positions: Tensor, k_positions: Tensor, w_sink: int, w_recent: int) -> Tensor:
    """Streaming attention: a query sees the first `w_sink` and the latest `w_recent` of the causal keys, its own included.

    Args:
        q_positions: positions of the queries in their own sequence, from 0; broadcastable against `k_positions`.
        k_positions: positions of the keys in the same sequence; negative for padding and empty slots.
        w_sink: sink tokens. w_recent: window in tokens.

    Returns:
        Boolean tensor of the broadcast shape, True where the query sees the key.
    """
    near = (k_positions < w_sink) | (q_positions - k_positions < w_recent)
    return full_visible(q_positions, k_positions) & near


def at_least_one(visible_BQK: Tensor) -> Tensor:
    """The mask in which a query that sees nothing (padding) sees the first key, so that its softmax is not 0/0."""
    blind_BQ = ~visible_BQK.any(dim=-1)
    first_K = torch.arange(visible_BQK.shape[-1], device=visible_BQK.device) == 0
    return visible_BQK | (blind_BQ[..., None] & first_K)
