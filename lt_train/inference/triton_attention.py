"""Attention of a decoding step on a GPU by kernels of our own in Triton, which comes with torch for CUDA.

The keys of a row are divided over several programs, so that few rows fill the GPU too; a second kernel joins what they found.

Shapes as in key_blocks.py; S parts of a row's keys.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt_train.inference.key_blocks import KeyBlocks
from lt_train.runtime.devices import dtype_name

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 16384
"""Bytes of keys that a program reads at a time: with values, and three times so that some are on their way, GPUs of all kinds have
room for it."""
_WARPS, _STAGES = 4, 3
_PROGRAMS = 1024
"""Programs that fill a GPU: several for each of its some hundred multiprocessors."""
_LOG2_E = 1.4426950408889634


def attend_blocks(
    q_BGQD: Tensor, keys: Tensor, values: Tensor, blocks: KeyBlocks, scaling: float, sinks_GQ: Tensor | None
) -> Tensor:
    """As `block_attention.attend_blocks`; of 16-bit keys and values the weights are rounded to them before their product."""
    with torch.cuda.device(keys.device) if keys.is_cuda else nullcontext():  # where Triton starts its kernels
        return _attend_blocks(q_BGQD, keys, values, blocks, scaling, sinks_GQ)


def _attend_blocks(
    q_BGQD: Tensor, keys: Tensor, values: Tensor, blocks: KeyBlocks, scaling: float, sinks_GQ: Tensor | None
) -> Tensor:
    rows, groups, queries, size = q_BGQD.shape
    parts = min(triton.cdiv(_PROGRAMS, rows * groups), 64)
    q_BGQD = q_BGQD.to(keys.dtype).contiguous()
    sum_BGSQD = torch.empty(rows, groups, parts, queries, size, dtype=torch.float32, device=q_BGQD.device)
    largest_BGSQ, total_BGSQ = torch.empty(2, rows, groups, parts, queries, dtype=torch.float32, device=q_BGQD.device)
    out_BGQD = torch.empty_like(q_BGQD, dtype=torch.float32)
    padded = {"QUERIES": max(16, triton.next_power_of_2(queries)), "SIZE": max(16, triton.next_power_of_2(size))}
    tile = max(16, _TILE // (padded["SIZE"] * keys.itemsize))
    _attend_part[rows, groups, parts](
        *(q_BGQD, keys, values, sum_BGSQD, largest_BGSQ, total_BGSQ),
        *(blocks.start_N, blocks.length_N, blocks.earlier_N, blocks.first_B, blocks.seen_BT, blocks.left_BT, blocks.always_B),
        *(blocks.head_stride, scaling * _LOG2_E, parts, groups, queries, blocks.seen_BT.shape[1], size),
        KEYS=tile,
        TILES=triton.cdiv(blocks.longest, tile),
        ALIGNED=size & -size,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        **padded,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    sinks = q_BGQD if sinks_GQ is None else sinks_GQ.float().contiguous()
    _join_parts[rows, groups](
        *(sum_BGSQD, largest_BGSQ, total_BGSQ, sinks, out_BGQD, parts, groups, queries, size),
        HAS_SINKS=sinks_GQ is not None,
        **padded,
    )
    return out_BGQD


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention to a cache there cannot be computed so; None where it can. The first call on a machine compiles, in seconds."""
    if dtype not in _TYPES:
        return f"the cache is in {dtype_name(dtype)}"
    keys = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)
    blocks = KeyBlocks.of_one_length(torch.tensor([0]), 16, torch.tensor([0, 1]), torch.tensor([[1]]), keys.stride(1))
    try:
        attend_blocks(keys[:, :, :1], keys, keys, blocks.to(device), 1.0, None)
    except Exception as error:  # Triton needs a C compiler, an assembler and a driver, and each fails in its own way
        return f"Triton fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


@triton.jit(do_not_specialize=["parts"])  # it changes with the number of rows
def _attend_part(
    q_BGQD,
    keys,
    values,
    sum_BGSQD,
    largest_BGSQ,
    total_BGSQ,
    start_N,
    length_N,
    earlier_N,
    first_B,
    seen_BT,
    left_BT,
    always_B,
    head_stride,
    scaling,  # of scores to the base 2
    parts,
    groups,
    queries,
    tokens,
    size,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,  # a power of two that divides every start
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One part of a row's blocks of keys, for one KV head: a softmax that runs over tiles of KEYS keys."""
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query, dim, key = tl.arange(0, QUERIES), tl.arange(0, SIZE), tl.arange(0, KEYS)
    here = (row * groups + group) * queries
    is_query = query[:, None] < queries
    is_number = is_query & (dim[None, :] < size)
    q = tl.load(q_BGQD + (here + query[:, None]).to(tl.int64) * size + dim[None, :], mask=is_number, other=0.0)
    token = row * tokens + query % tokens
    seen = tl.load(seen_BT + token, mask=query < queries, other=0)[:, None]
    left = tl.load(left_BT + token, mask=query < queries, other=0)[:, None]
    always = tl.load(always_B + row)
    latest = tl.load(seen_BT + row * tokens + tokens - 1)
    row_begin, row_end = tl.load(first_B + row), tl.load(first_B + row + 1)
    each = tl.cdiv(row_end - row_begin, parts)
    begin = row_begin + part * each
    end = tl.minimum(begin + each, row_end)
    before_row = tl.load(earlier_N + row_begin, mask=row_begin < row_end, other=0)

    largest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, SIZE], tl.float32)
    for step in range(begin * TILES, end * TILES):
        block = step // TILES
        in_block = (step % TILES) * KEYS + key
        start = tl.multiple_of(tl.load(start_N + block), ALIGNED)  # else its numbers would be read one by one
        at = start + group * head_stride + in_block[:, None] * size + dim[None, :]
        number = tl.load(earlier_N + block) - before_row + in_block
        is_held = (in_block < tl.load(length_N + block)) & (number < latest)
        is_read = is_held[:, None] & (dim[None, :] < size)
        k = tl.load(keys + at, mask=is_read, other=0.0)
        v = tl.load(values + at, mask=is_read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        is_seen = is_held[None, :] & (number[None, :] < seen) & ((number[None, :] < always) | (number[None, :] >= always + left))
        scores = tl.where(is_seen, scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        factor = tl.exp2(largest - most)
        weights = tl.exp2(scores - most[:, None])
        total = total * factor + tl.sum(weights, 1)
        out = out * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = most

    place = ((row * groups + group) * parts + part) * queries + query
    tl.store(largest_BGSQ + place, largest, mask=query < queries)
    tl.store(total_BGSQ + place, total, mask=query < queries)
    tl.store(sum_BGSQD + place[:, None].to(tl.int64) * size + dim[None, :], out, mask=is_number)


@triton.jit(do_not_specialize=["parts"])  # it changes with the number of rows
def _join_parts(
    sum_BGSQD,
    largest_BGSQ,
    total_BGSQ,
    sinks_GQ,
    out_BGQD,
    parts,
    groups,
    queries,
    size,
    HAS_SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One softmax of a row's parts and its learned sink."""
    row, group = tl.program_id(0), tl.program_id(1)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, SIZE)
    is_query = query < queries
    is_number = is_query[:, None] & (dim[None, :] < size)
    if HAS_SINKS:
        largest = tl.load(sinks_GQ + group * queries + query, mask=is_query, other=0.0) * 1.4426950408889634
        total = tl.full([QUERIES], 1.0, tl.float32)
    else:
        largest = tl.full([QUERIES], -1e30, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, SIZE], tl.float32)
    for part in range(parts):
        place = ((row * groups + group) * parts + part) * queries + query
        part_largest = tl.load(largest_BGSQ + place, mask=is_query, other=-1e30)
        most = tl.maximum(largest, part_largest)
        factor, part_factor = tl.exp2(largest - most), tl.exp2(part_largest - most)
        total = total * factor + tl.load(total_BGSQ + place, mask=is_query, other=0.0) * part_factor
        part_sum = tl.load(sum_BGSQD + place[:, None].to(tl.int64) * size + dim[None, :], mask=is_number, other=0.0)
        out = out * factor[:, None] + part_sum * part_factor[:, None]
        largest = most
    at = ((row * groups + group) * queries + query)[:, None].to(tl.int64) * size + dim[None, :]
    total = tl.where(is_query, total, 1.0)
    tl.store(out_BGQD + at, out / total[:, None], mask=is_number)
