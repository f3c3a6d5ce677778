"""Attention of a decoding step on a CPU by decode_attention.c, which is compiled when it is first needed.

torch's matrix products read the keys of a few queries at a fraction of the memory's rate. Where there is no compiler, they do it.

Shapes as in key_blocks.py.
"""

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from lt_train.inference.compiled_c import compiled, shown_as
from lt_train.inference.key_blocks import KeyBlocks
from lt_train.runtime.devices import dtype_name

_SOURCE = "decode_attention.c"
_TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",), torch.float16: ("-DFP16",)}


def attend_blocks(
    q_BGQD: Tensor, keys: Tensor, values: Tensor, blocks: KeyBlocks, scaling: float, sinks_GQ: Tensor | None
) -> Tensor:
    """As `block_attention.attend_blocks`. Raises RuntimeError: there is an obstacle to it (`obstacle`)."""
    attend = compiled(_SOURCE, *_TYPES[keys.dtype]).attend
    rows, groups, queries, size = q_BGQD.shape
    q_BGQD = q_BGQD.float().contiguous()
    out_BGQD = torch.empty_like(q_BGQD)
    sinks_GQ = None if sinks_GQ is None else sinks_GQ.float().contiguous()
    held = (q_BGQD, keys, values, blocks.start_N, blocks.length_N, blocks.first_B, blocks.seen_BT, blocks.left_BT, blocks.always_B)
    with shown_as("compiled attention"):
        attend(
            *(c_void_p(tensor.data_ptr()) for tensor in held),
            c_int64(blocks.head_stride),
            *map(c_int, (blocks.longest, rows, groups, queries, blocks.seen_BT.shape[1], size)),
            c_float(scaling),
            None if sinks_GQ is None else c_void_p(sinks_GQ.data_ptr()),
            c_void_p(out_BGQD.data_ptr()),
        )
    return out_BGQD


@cache
def obstacle(dtype: torch.dtype) -> str | None:
    """Why attention to a cache in `dtype` cannot be computed so; None where it can. The first call compiles."""
    if dtype not in _TYPES:
        return f"the cache is in {dtype_name(dtype)}"
    try:
        compiled(_SOURCE, *_TYPES[dtype])
    except RuntimeError as error:
        return str(error)
    return None
