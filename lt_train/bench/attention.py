"""Streaming attention against full causal attention, forward and backward, by length and window, in one run.

The limit is the ratio of floating-point operations: the pairs of query and key that full attention computes, by those of streaming
attention. A kernel that is as fast per operation as full attention, and computes only these pairs, reaches the limit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lt_train.bench.printing import measurement_table, print_lines
from lt_train.hybrid.attention_kernels import KERNELS, Use, choose
from lt_train.hybrid.documents import find_documents
from lt_train.planning.compute import causal_pairs, streaming_pairs
from lt_train.runtime.devices import compute_device, compute_dtype, device_name, dtype_name, wait_for
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress

FULL = "full"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The default input on a kind of device: one row of these lengths in tokens, with heads of this shape."""

    lengths: tuple[int, ...]
    heads: int
    groups: int
    head_size: int


ON_CPU = Shape((256, 1024, 4096, 16384), heads=4, groups=4, head_size=64)
ON_GPU = Shape((4096, 8192, 16384, 32768, 65536), heads=32, groups=8, head_size=128)
DEFAULT_WINDOWS = (252, 1020)


@dataclass(frozen=True)
class KernelTiming:
    """One kernel at one length and window. milliseconds: for one forward and backward pass; full: the same for full attention."""

    length: int
    w_recent: int
    kernel: str
    milliseconds: float
    full: float


def bench_attention(
    kernels: Sequence[str], lengths: Sequence[int], windows: Sequence[int], w_sink: int, runs: int, console: Console
) -> None:
    """Print the table.

    Args:
        kernels: as in model.attention; none: all that can train on this device, except the slow reference.
        lengths: in tokens; none: those of ON_CPU or ON_GPU.

    Raises:
        HybridError: there is no such kernel, or it cannot train on this device.
        UserError: a length, window or number of runs below 1, or a negative number of sinks.
    """
    for option, values, least in (
        ("--at", lengths, 1),
        ("--w-recent", windows, 1),
        ("--runs", [runs], 1),
        ("--w-sink", [w_sink], 0),
    ):
        if min(values, default=least) < least:
            raise UserError(f"{option}: {min(values)}: too small. Fix: set at least {least}")
    device, dtype = compute_device(), compute_dtype("auto")
    shape = ON_CPU if device.type == "cpu" else ON_GPU
    use = Use(device, dtype, shape.head_size, trains=True)
    names = list(dict.fromkeys(choose(name, use).name for name in kernels)) or [
        name for name, kernel in KERNELS.items() if name != "reference" and kernel.obstacle(use) is None
    ]
    lengths, windows = sorted(set(lengths or shape.lengths)), sorted(set(windows))
    timings: list[KernelTiming] = []
    with show_progress("timing", total=len(lengths) * runs) as bar:
        for length in lengths:
            timings += time_length(shape, use, length, names, windows, w_sink, runs, bar.advance)
    print_lines(
        console,
        f"one row, {shape.heads} query heads, {shape.groups} key/value heads, head size {shape.head_size}, "
        f"{dtype_name(dtype)} on {device_name(device)}; w_sink {w_sink}; forward and "
        f"backward, medians of {runs} interleaved runs",
    )
    console.print(attention_table(timings, w_sink))
    print_lines(
        console,
        "full: scaled_dot_product_attention, causal, by the kernel that torch chooses; limit: its pairs of query and key by "
        "those of streaming attention; reached: faster / limit",
    )


def time_length(
    shape: Shape,
    use: Use,
    length: int,
    kernels: Sequence[str],
    windows: Sequence[int],
    w_sink: int,
    runs: int,
    advance: Callable[[], None],
) -> list[KernelTiming]:
    """All kernels and windows at one length, and full attention: one warm-up run each, then interleaved runs."""
    sizes = [(1, heads, length, shape.head_size) for heads in (shape.heads, shape.groups, shape.groups, shape.heads)]
    *qkv, dout = (torch.randn(size, device=use.device, dtype=use.dtype) for size in sizes)
    qkv = [x.requires_grad_() for x in qkv]
    scaling = shape.head_size**-0.5
    documents = find_documents(1, length, use.device, None, None)
    attentions: dict[tuple[str, int], Attention] = {(FULL, 0): partial(_full, grouped=shape.heads != shape.groups)}
    for name in kernels:
        for w_recent in windows:
            attentions[name, w_recent] = partial(
                KERNELS[name].streaming, documents, w_sink=w_sink, w_recent=w_recent, scaling=scaling
            )
    for attention in attentions.values():
        _seconds(attention, qkv, dout)
    times: dict[tuple[str, int], list[float]] = {which: [] for which in attentions}
    for _ in range(runs):
        for which, attention in attentions.items():
            times[which].append(1000 * _seconds(attention, qkv, dout))
        advance()
    full = median(times.pop((FULL, 0)))
    return [KernelTiming(length, w_recent, name, median(found), full) for (name, w_recent), found in times.items()]


def _full(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _seconds(attention: Attention, qkv: Sequence[Tensor], dout: Tensor) -> float:
    wait_for(dout.device)
    started = time.perf_counter()
    torch.autograd.grad(attention(*qkv), qkv, dout)
    wait_for(dout.device)
    return time.perf_counter() - started


def attention_table(timings: Sequence[KernelTiming], w_sink: int) -> Table:
    table = measurement_table("tokens", "window", "kernel", "ms", "full ms", "faster", "limit", "reached")
    for number, timing in enumerate(timings):
        faster = timing.full / timing.milliseconds
        limit = causal_pairs(timing.length) / streaming_pairs(timing.length, w_sink + timing.w_recent)
        table.add_row(
            f"{timing.length:,}",
            f"{timing.w_recent:,}",
            timing.kernel,
            f"{timing.milliseconds:,.1f}",
            f"{timing.full:,.1f}",
            f"{faster:.2f}x",
            f"{limit:.2f}x",
            f"{100 * faster / limit:.0f} %",
            end_section=number + 1 < len(timings) and timings[number + 1].length != timing.length,
        )
    return table
