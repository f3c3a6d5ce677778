"""Tensors in huge pages of memory, where Linux has them: with fewer of its own tables to look up, a CPU reads them faster."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 2**21
"""Bytes of a tensor that may have them: one such page."""


def huge_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`."""
    memory = _huge_pages(math.prod(shape) * dtype.itemsize) if device.type == "cpu" else None
    if memory is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(*shape).zero_()  # written to, it is allocated now


def _huge_pages(size: int) -> mmap.mmap | None:
    """Memory that the system asks for in huge pages; None where there are none, or no room."""
    if size < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return memory
