"""Streaming attention in time and memory linear in length, in plain torch, on any device, differentiable.

The first `w_sink + w_recent` queries see everything before them: causal attention. From there on the window has left the sinks
behind, so a block of queries sees two disjoint sets: the sinks, all of them, and a band of keys whose shape within the block is
the same for every block. Blocks are stacked into the batch and share one small mask.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, D head size, N blocks, Q queries of a block,
S keys a block looks at.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Small blocks waste less on keys that a block's other queries want; large ones copy fewer keys. Measured best between these.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 256


def blocked_streaming_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, w_sink: int, w_recent: int, scaling: float
) -> Tensor:
    """Streaming attention over rows that are one document each.

    Args:
        q_BHTD: queries after rotary embedding. k_BGTD, v_BGTD: keys and values; G divides H (grouped-query attention).
        w_sink, w_recent: sizes in tokens, the window includes the query itself.

    Returns:
        out_BHTD, equal to the reference attention.
    """
    length = q_BHTD.shape[2]
    seeing_all = min(w_sink + w_recent, length)
    head = _causal(*(x[:, :, :seeing_all] for x in (q_BHTD, k_BGTD, v_BGTD)), scaling)
    if seeing_all == length:
        return head
    return torch.cat([head, _banded(q_BHTD, k_BGTD, v_BGTD, w_sink, w_recent, scaling)], dim=2)


def _causal(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scaling: float) -> Tensor:
    grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
    return scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scaling, enable_gqa=grouped)


def _banded(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, w_sink: int, w_recent: int, scaling: float) -> Tensor:
    """The queries from w_sink + w_recent on: w_sink sinks and a band of w_recent keys each."""
    first = w_sink + w_recent
    block = _block_size(w_recent)
    q_BGNRQD = _query_blocks(q_BHTD[:, :, first:], k_BGTD.shape[1], block)
    queries, blocks = q_BHTD.shape[2] - first, q_BGNRQD.shape[2]
    k_BGNSD, v_BGNSD = (_key_blocks(x, first - w_recent + 1, blocks, block, w_sink, w_recent) for x in (k_BGTD, v_BGTD))
    visible_QS = _band(block, w_sink, w_recent, q_BHTD.device)

    # All that shares keys becomes rows of one attention problem: query heads of a group are stacked, so no key is repeated.
    batch, groups, _, repeats, _, size = q_BGNRQD.shape
    out = scaled_dot_product_attention(
        q_BGNRQD.reshape(batch * groups, blocks, repeats * block, size),
        k_BGNSD.flatten(0, 1),
        v_BGNSD.flatten(0, 1),
        attn_mask=visible_QS.repeat(repeats, 1),
        scale=scaling,
    )
    out_BGRNQD = out.unflatten(2, (repeats, block)).unflatten(0, (batch, groups)).transpose(2, 3)
    return out_BGRNQD.reshape(batch, groups * repeats, blocks * block, -1)[:, :, :queries]


def _block_size(w_recent: int) -> int:
    """Queries of a block: about a quarter of the window, in steps of 64, so that a block looks at little beyond its window."""
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, w_recent // 4 // _SMALLEST_BLOCK * _SMALLEST_BLOCK))


def _query_blocks(q_BHTD: Tensor, groups: int, block: int) -> Tensor:
    """[B, H, T, D] -> [B, G, N, R, Q, D]; the last block is filled up with zero queries."""
    short = -q_BHTD.shape[2] % block
    blocks = pad(q_BHTD, (0, 0, 0, short)).unflatten(2, (-1, block))
    return blocks.unflatten(1, (groups, -1)).transpose(2, 3)


def _key_blocks(x_BGTD: Tensor, first: int, blocks: int, block: int, w_sink: int, w_recent: int) -> Tensor:
    """[B, G, T, D] -> [B, G, N, S, D]: the sinks, then the w_recent - 1 + Q keys from `first` on, one block further each."""
    span = w_recent - 1 + block
    missing = max(first + (blocks - 1) * block + span - x_BGTD.shape[2], 0)
    band_BGNSD = pad(x_BGTD[:, :, first:], (0, 0, 0, missing)).unfold(2, span, block).transpose(-1, -2)
    sinks_BGNSD = x_BGTD[:, :, None, :w_sink].expand(-1, -1, blocks, -1, -1)
    return torch.cat([sinks_BGNSD, band_BGNSD], dim=3)


def _band(block: int, w_sink: int, w_recent: int, device: torch.device) -> Tensor:
    """[Q, S], True where the query sees the key: all sinks, and key i .. i + w_recent - 1 of the band for query i."""
    query_Q = torch.arange(block, device=device)
    key_S = torch.arange(w_recent - 1 + block, device=device)
    offset_QS = key_S[None, :] - query_Q[:, None]
    band_QS = (offset_QS >= 0) & (offset_QS < w_recent)
    return torch.cat([band_QS.new_ones(block, w_sink), band_QS], dim=1)
