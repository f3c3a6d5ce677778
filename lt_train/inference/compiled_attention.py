"""Attention of a decoding step on a CPU by decode_attention.c, which is compiled when it is first needed.

torch's matrix products read the keys of a few queries at a fraction of the memory's rate. Where there is no compiler, they do it.

Shapes as in key_blocks.py.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from lt_train.inference.key_blocks import KeyBlocks
from lt_train.runtime.devices import dtype_name

_SOURCE = Path(__file__).with_name("decode_attention.c")
_TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",), torch.float16: ("-DFP16",)}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-fPIC")
_SECONDS = 60


def attend_blocks(
    q_BGQD: Tensor, keys: Tensor, values: Tensor, blocks: KeyBlocks, scaling: float, sinks_GQ: Tensor | None
) -> Tensor:
    """As `block_attention.attend_blocks`. Raises RuntimeError: there is an obstacle to it (`obstacle`)."""
    function = _compiled(keys.dtype)
    rows, groups, queries, size = q_BGQD.shape
    q_BGQD = q_BGQD.float().contiguous()
    out_BGQD = torch.empty_like(q_BGQD)
    sinks_GQ = None if sinks_GQ is None else sinks_GQ.float().contiguous()
    held = (q_BGQD, keys, values, blocks.start_N, blocks.length_N, blocks.first_B, blocks.seen_BT, blocks.left_BT, blocks.always_B)
    with record_function("compiled attention"):  # a profile would take it for the time between operators
        function(
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
    """Why attention to a cache in `dtype` cannot be computed so; None where it can. The first call compiles, in under a second."""
    if dtype not in _TYPES:
        return f"the cache is in {dtype_name(dtype)}"
    try:
        _compiled(dtype)
    except RuntimeError as error:
        return str(error)
    return None


@cache
def _compiled(dtype: torch.dtype) -> Callable[..., None]:
    """The function for a cache of this dtype. Raises RuntimeError: the compiler is missing or fails, in its words."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, or what CC names)")
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = Path(folder, "attention.o"), Path(folder, "attention.so")
        _run([compiler, *_FLAGS, *_TYPES[dtype], "-c", str(_SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), "-o", str(library)])  # without OpenMP's library: torch has loaded its own
        try:
            return CDLL(str(library)).attend
        except OSError as error:
            raise RuntimeError(f"what the compiler made cannot be loaded ({error})") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} fails: {next(iter(done.stderr.splitlines()), f'exit code {done.returncode}')}")
