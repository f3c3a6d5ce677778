"""FlexAttention: one compiled kernel for every visibility; a block mask lists the tiles of 128 x 128 that it computes.

The mask is built once for all layers of a kind, from the documents and tile by tile: never as [T, T]. Lengths are rounded up to a
few sizes, so that few kernels are compiled; a tile of padding costs nothing.

Shapes: B rows, T columns, S columns with the padding, Q tiles of queries, K tiles of keys, H query heads, G key/value heads,
D head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from .documents import Documents
from .mask import streaming_visible

TILE = 128
_MOST_KERNELS = 64
"""Kernels that may be compiled in one process: an error after that many means that one is compiled again and again."""


def flex_streaming_attention(
    documents: Documents,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    w_sink: int,
    w_recent: int,
    scaling: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Streaming attention within each document; padding gets zeros. Returns out_BHTD.

    On a CPU it computes dense scores and no gradients: only for tests.
    """
    device = q_BHTD.device
    mask = documents.once(("flex", device, w_sink, w_recent), lambda: block_mask(documents, w_sink, w_recent, device))
    length = q_BHTD.shape[2]
    q_BHSD, k_BGSD, v_BGSD = (pad(x, (0, 0, 0, rounded_length(length) - length)) for x in (q_BHTD, k_BGTD, v_BGTD))
    flex = flex_attention if device.type == "cpu" else compiled_flex_attention()
    grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
    settings = dict(block_mask=mask, scale=scaling, enable_gqa=grouped)
    if sinks_H is None:
        return flex(q_BHSD, k_BGSD, v_BGSD, **settings)[:, :, :length]
    out_BHSD, found = flex(q_BHSD, k_BGSD, v_BGSD, **settings, return_aux=AuxRequest(lse=True))
    return (out_BHSD * torch.sigmoid(found.lse - sinks_H[:, None])[..., None]).to(q_BHTD.dtype)[:, :, :length]


def flex_full_attention(documents: Documents, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, scaling: float) -> Tensor:
    """Full causal attention within each document: streaming attention with a window as long as the row."""
    columns = documents.shape[1]
    return flex_streaming_attention(documents, q_BHTD, k_BGTD, v_BGTD, w_sink=0, w_recent=columns, scaling=scaling)


@cache
def compiled_flex_attention(backend: str = "inductor") -> Callable[..., Any]:
    """fullgraph: without it, torch computes what it cannot compile with dense scores, in memory quadratic in T."""
    compiled = torch.compile(flex_attention, fullgraph=True, backend=backend)

    def flex(*tensors: Tensor, **settings: Any) -> Any:
        # torch's limit of 8 is soon reached: one row or several, gradients or none, each dtype and head size has its own kernel.
        with torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
            return compiled(*tensors, **settings)

    return flex


def rounded_length(length: int) -> int:
    """`length` rounded up to a multiple of a quarter of the next lower power of two: four sizes for each doubling."""
    step = max(TILE, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def block_mask(documents: Documents, w_sink: int, w_recent: int, device: torch.device) -> BlockMask:
    """What streaming attention sees of these documents, over `rounded_length` columns."""
    document_BS, position_BS = _places(documents, device)
    # Sizes as tensors: Python numbers are constants of the compiled kernel, so each window would compile a kernel of its own.
    sink, recent = (torch.tensor(size, dtype=torch.int32, device=device) for size in (w_sink, w_recent))

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = streaming_visible(position_BS[row, query], position_BS[row, key], sink, recent)
        return near & (document_BS[row, query] == document_BS[row, key])

    some_BQK, all_BQK = tiles_seen(position_BS, w_sink, w_recent)
    columns = position_BS.shape[1]
    return BlockMask.from_kv_blocks(
        *_ordered(some_BQK & ~all_BQK),
        *_ordered(all_BQK),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(columns, columns),
    )


def _places(documents: Documents, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each column's document and its position in it, int32 [B, S]; -1 on padding, so that it sees nothing and nothing sees it."""
    rows, columns = documents.shape
    document_BS = torch.full((rows, rounded_length(columns)), -1, dtype=torch.int32)
    position_BS = document_BS.clone()
    for number, (row, start, length) in enumerate(documents.spans):
        document_BS[row, start : start + length] = number
        position_BS[row, start : start + length] = torch.arange(length, dtype=torch.int32)
    return document_BS.to(device), position_BS.to(device)


def tiles_seen(position_BS: Tensor, w_sink: int, w_recent: int) -> tuple[Tensor, Tensor]:
    """Which tiles hold a visible pair, and which hold only visible pairs: booleans [B, Q, K].

    The first is exact; the second may leave out tiles. Windows begin in the order of their queries, so a tile of queries sees the
    keys from the start of its first query's window to its last query. The only sinks outside this range are those of its first
    query, because any other document begins within the tile.
    """
    columns = position_BS.shape[1]
    column_S = torch.arange(columns, device=position_BS.device)
    real_BQt = (position_BS >= 0).unflatten(1, (-1, TILE))
    start_BS = column_S - position_BS
    start_BQt, window_BQt, column_Qt = (
        x.unflatten(-1, (-1, TILE)) for x in (start_BS, torch.maximum(start_BS, column_S - w_recent + 1), column_S)
    )
    far = columns + TILE  # beyond every key: padding sees nothing
    start_BQ, window_BQ = (torch.where(real_BQt, x, far).amin(-1)[..., None] for x in (start_BQt, window_BQt))
    last_BQ = torch.where(real_BQt, column_Qt, -1).amax(-1)[..., None]
    first_key_K, last_key_K = column_Qt[:, 0], column_Qt[:, -1]

    near_BQK = (last_key_K >= window_BQ) & (first_key_K <= last_BQ)
    sinks_BQK = (w_sink > 0) & (last_key_K >= start_BQ) & (first_key_K < start_BQ + w_sink) & (first_key_K <= last_BQ)

    one_document_BQ = (real_BQt.all(-1) & (start_BQt.amin(-1) == start_BQt.amax(-1)))[..., None]
    before_Q = column_Qt[:, :1]  # the first query of the tile
    in_window_BQK = first_key_K >= window_BQt[..., -1:]
    in_sinks_BQK = (first_key_K >= start_BQ) & (last_key_K < start_BQ + w_sink)
    all_BQK = one_document_BQ & (last_key_K <= before_Q) & (in_window_BQK | in_sinks_BQK)
    return near_BQK | sinks_BQK, all_BQK


def _ordered(tiles_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries sees [B, 1, Q], and their indices before all others [B, 1, Q, K]; int32."""
    indices_BQK = tiles_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return tiles_BQK.sum(-1, dtype=torch.int32)[:, None], indices_BQK.to(torch.int32)[:, None]
