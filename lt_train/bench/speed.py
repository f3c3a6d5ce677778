"""How fast this device is: memory, matrix products, streaming against full attention, and decoding with a long context."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lt_train.bench.attention import Shape, time_length
from lt_train.bench.base import RandomBase, hybrid_spec, random_base
from lt_train.bench.checks import CannotRun, Check, Finding
from lt_train.bench.decode import STEPS, Throughput, throughput
from lt_train.bench.roofline import COPIED, MATRIX, copy_rate, product_rate
from lt_train.hybrid.attention_kernels import Use, choose
from lt_train.hybrid.loading import build_hybrid
from lt_train.inference.kv_store import kv_sizes
from lt_train.planning.compute import causal_pairs, streaming_pairs
from lt_train.runtime.devices import compute_device, compute_dtype, dtype_name, free_memory, release_memory
from lt_train.runtime.units import GIB, format_bytes, format_tokens

W_SINK, W_RECENT = 4, 1020
RUNS = 3
ROOM = 0.8
"""Fraction of the free memory that weights and KV cache may take."""


@dataclass(frozen=True)
class Sizes:
    """The sizes measured on a kind of device.

    Attributes:
        copied: bytes of a copy.
        matrix: rows of square matrices.
        attention: one row for each of its lengths.
        shape: of the model that decodes, a name or a config.json.
        context: tokens of its sequences.
        kv_budget: bytes of its cache; at least one sequence.
    """

    copied: int
    matrix: int
    attention: Shape
    shape: str
    context: int
    kv_budget: int


ON_CPU = Sizes(COPIED["cpu"], MATRIX["cpu"], Shape((2048, 4096, 8192), heads=4, groups=4, head_size=64), "135m", 16384, GIB)
ON_GPU = Sizes(
    COPIED["cuda"],
    MATRIX["cuda"],
    Shape((4096, 8192, 16384, 32768, 65536), heads=32, groups=8, head_size=128),
    "8b",
    16384,
    24 * GIB,
)


def speed_checks(sizes: Sizes) -> Iterator[Check]:
    """
    Raises:
        UserError: there is no such shape.
    """
    base = random_base(sizes.shape)
    yield Check("memory_bandwidth", "memory bandwidth", partial(_bandwidth, sizes.copied))
    yield Check("matmul", "matrix products", partial(_matmul, sizes.matrix))
    for length in sizes.attention.lengths:
        title = f"streaming, {format_tokens(length)} tokens"
        yield Check(f"streaming.{length}", title, partial(_streaming, sizes.attention, length))
    title = f"decode at {format_tokens(sizes.context)}, 50 %"
    yield Check("decode", title, partial(_decode, base, sizes))


def _bandwidth(size: int) -> Finding:
    rate = copy_rate(size)
    return Finding(f"{rate / 1e9:,.1f} GB/s, read and written", {"bytes_per_second": rate})


def _matmul(rows: int) -> Finding:
    dtype = compute_dtype("auto")
    rate = product_rate(rows, dtype)
    return Finding(f"{rate / 1e12:,.3g} TFLOP/s in {dtype_name(dtype)}", {"flops_per_second": rate})


def _streaming(shape: Shape, length: int) -> Finding:
    """Forward and backward by the kernel of `auto`."""
    use = Use(compute_device(), compute_dtype("auto"), shape.head_size, trains=True)
    kernel = choose("auto", use).name
    (timing,) = time_length(shape, use, length, [kernel], [W_RECENT], W_SINK, RUNS, lambda: None)
    faster = timing.full / timing.milliseconds
    limit = causal_pairs(length) / streaming_pairs(length, W_SINK + W_RECENT)
    numbers = {"ratio": faster, "limit": limit, "milliseconds": timing.milliseconds, "full_milliseconds": timing.full}
    return Finding(f"{faster:.2f}x full attention by {kernel} (limit {limit:.2f}x)", numbers)


def _decode(base: RandomBase, sizes: Sizes) -> Finding:
    """With half of the layers streaming against full attention, each with the same KV budget."""
    specs = [hybrid_spec(base.config(), ratio, W_SINK, W_RECENT) for ratio in (0, 0.5)]
    dtype = compute_dtype(base.dtype)
    with torch.device("meta"):
        weights = build_hybrid(base.config(), specs[0]).num_parameters() * dtype.itemsize
    release_memory()  # of the checks before
    free = free_memory(compute_device())
    if weights > ROOM * free:
        raise CannotRun(
            f"{base.name}: {format_bytes(weights)} of weights, and {format_bytes(free)} of memory are free. "
            "Fix: choose a smaller --shape"
        )
    found: list[Throughput] = []
    for spec in specs:
        hybrid = base.for_inference(spec)
        if not found:
            room, one = int(ROOM * free - weights), kv_sizes(hybrid).sequence(sizes.context + STEPS)
            if one > room:
                raise CannotRun(f"{base.name}: no memory for a sequence of {format_bytes(one)}. Fix: choose a smaller --shape")
            budget = max(one, min(sizes.kv_budget, room))
        found.append(throughput(hybrid, sizes.context, budget))
        del hybrid
        release_memory()
    full, ours = found
    faster = ours.tokens_per_second / full.tokens_per_second
    limit = ours.tokens_per_byte / full.tokens_per_byte
    numbers = {
        "ratio": faster,
        "limit": limit,
        "tokens_per_second": ours.tokens_per_second,
        "full_tokens_per_second": full.tokens_per_second,
        "sequences": ours.slots,
        "full_sequences": full.slots,
        "kv_budget": budget,
    }
    text = f"{ours.tokens_per_second:,.1f} tokens/s of {sizes.shape}, {faster:.2f}x full attention (limit {limit:.2f}x)"
    return Finding(text, numbers)
