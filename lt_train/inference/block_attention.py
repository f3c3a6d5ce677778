"""Attention of a decoding step to blocks of keys, by what reads them fastest on a device: C on a CPU, Triton on a GPU.

Shapes as in key_blocks.py.
"""

from functools import cache

import torch
from torch import Tensor

from lt_train.inference import compiled_attention
from lt_train.inference.key_blocks import KeyBlocks


def attend_blocks(
    q_BGQD: Tensor, keys: Tensor, values: Tensor, blocks: KeyBlocks, scaling: float, sinks_GQ: Tensor | None
) -> Tensor:
    """Softmax attention of each query to the keys it sees, computed in fp32 with keys and values as they are cached. Returns
    out_BGQD in fp32.

    Args:
        keys, values: of any shape whose last dimension is D.
        sinks_GQ: learned sinks of the queries.

    Raises:
        RuntimeError: there is an obstacle to it (`obstacle`).
    """
    if keys.device.type == "cpu":
        return compiled_attention.attend_blocks(q_BGQD, keys, values, blocks, scaling, sinks_GQ)
    from lt_train.inference import triton_attention  # Triton comes with torch for GPUs alone

    return triton_attention.attend_blocks(q_BGQD, keys, values, blocks, scaling, sinks_GQ)


@cache
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention to a cache there cannot be computed so; None where it can."""
    if device.type == "cpu":
        return compiled_attention.obstacle(dtype)
    if device.type != "cuda":
        return f"the model is on {device.type}"
    try:
        from lt_train.inference import triton_attention
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton_attention.obstacle(device, dtype)
