"""Tokens per second with a given KV budget: hybrids against full attention, all by the engine, in one run.

Memory traffic sets the limit: a step reads all weights once, and every sequence's keys and values once. With equal budgets a
hybrid's step has more sequences; `limit` is the ratio of its tokens per byte to those of full attention.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lt_train.bench.base import Base
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.bench.speculation import DraftRounds
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.kv_store import KVStore, PagedLayer, kv_sizes, pages_for
from lt_train.inference.runner import ModelRunner
from lt_train.runtime.devices import device_name, dtype_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress
from lt_train.runtime.units import MIB, format_bytes
from lt_train.selection.choose import evenly_spread_layers

DEFAULT_LENGTHS = (2048, 8192, 16384)
DEFAULT_RATIOS = (0.5, 0.75)
TIMED_STEPS = 16
"""A time is the median over this number of steps."""
STEPS = TIMED_STEPS + 1  # the last is for the profiler
PAPER = "the paper reports 2.17x at 16K for 50 % (LightTransfer-Train, QwQ-32B, arXiv 2410.13846)"


@dataclass(frozen=True)
class Throughput:
    """One model at one length of context."""

    slots: int
    kv_bytes: int
    """Keys and values of all sequences."""
    moved_bytes: int
    """What a step reads: weights, keys and values."""
    milliseconds: float
    gpu_milliseconds: float | None = None
    """Of a step, while the GPU computes; else it waits for Python. None on a CPU."""

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.slots / self.milliseconds

    @property
    def tokens_per_byte(self) -> float:
        return self.slots / self.moved_bytes


@torch.inference_mode()
def throughput(model: HybridForCausalLM, context: int, budget: int) -> Throughput:
    """Fill the budget with sequences of `context` tokens and time steps of all of them.

    Their keys and values are random: a step's time does not depend on them, and prefill would take hours on a CPU.

    Raises:
        UserError: the budget is below one such sequence.
    """
    sizes = kv_sizes(model)
    needed = sizes.sequence(context + STEPS)
    slots = budget // needed
    if slots == 0:
        raise UserError(budget_too_small(budget, context, needed))
    store = KVStore(model, slots, slots * pages_for(context + STEPS))
    fill(store, slots, context)
    runner = ModelRunner(model, store, prefill_chunk=1)
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        runner.step([1] * slots).argmax(-1).tolist()  # waits for the device
        times.append(time.perf_counter() - started)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = slots * sizes.sequence(context)
    on_gpu = gpu_milliseconds(lambda: runner.step([1] * slots)) if model.device.type == "cuda" else None
    return Throughput(slots, held, weights + held, 1000 * median(times), on_gpu)


def gpu_milliseconds(step: Callable[[], object]) -> float:
    """What the GPU's kernels and copies of one step take, one after the other."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e3


def budget_too_small(budget: int, tokens: int, needed: int) -> str:
    return (
        f"--kv-budget: {format_bytes(budget)}: less than one sequence of {tokens:,} tokens. "
        f"Fix: set at least {math.ceil(needed / MIB):,} MiB"
    )


def fill(store: KVStore, slots: int, context: int) -> None:
    for _ in range(slots):
        slot = store.admit(context + STEPS)
        store.lengths[slot] = context
    for layer in store.layers:
        used = slice(None) if isinstance(layer, PagedLayer) else slice(slots)
        layer.keys[used].normal_()
        layer.values[used].normal_()


def bench_decode(
    base: Base,
    ratios: Sequence[float],
    w_sink: int,
    w_recent: int,
    lengths: Sequence[int],
    budget: int,
    console: Console,
    drafts: DraftRounds | None = None,
) -> None:
    """Print the table, and that of `drafts`. The streaming layers are evenly spread: which layers stream does not matter for speed.

    Raises:
        UserError: there is no such model, no layer or every layer would stream, or the budget is below one sequence; see also
            `DraftRounds.time`.
    """
    num_layers = base.config().num_hidden_layers
    variants = [(), *(evenly_spread_layers(ratio, num_layers) for ratio in ratios)]
    found: dict[tuple[int, ...], list[Throughput]] = {}
    with show_progress("timing", total=len(variants) * len(lengths)) as bar:
        for lazy in variants:
            hybrid = base.for_inference(HybridSpec(num_layers, lazy, w_sink, w_recent))
            for context in lengths:
                found.setdefault(lazy, []).append(throughput(hybrid, context, budget))
                bar.advance()
            if drafts is not None:
                plain = [(at_length.slots, at_length.tokens_per_second) for at_length in found[lazy]]
                drafts.time(hybrid, base, lengths, budget, plain)
            about = f"{base.name}, {hybrid.num_parameters() / 1e6:,.1f} M parameters, {dtype_name(hybrid.dtype)}"
            about += f" on {device_name(hybrid.device)}"
            del hybrid
    print_lines(
        console,
        f"{about}; KV budget {budget / 2**20:,.0f} MiB for each, w_sink {w_sink}, w_recent {w_recent}; medians of {TIMED_STEPS} "
        "steps, full slots, random keys and values",
    )
    console.print(throughput_table(num_layers, lengths, found))
    legend = "limit: tokens per byte moved (weights, keys and values) by those of full attention; reached: faster / limit"
    print_lines(console, legend)
    if found[()][0].gpu_milliseconds is not None:
        print_lines(
            console, "GPU ms: of a step, while the GPU computes; else it waits for Python. faster by it: tokens per GPU second"
        )
    print_lines(console, PAPER)
    if drafts is not None:
        drafts.print(console)


def throughput_table(num_layers: int, lengths: Sequence[int], found: dict[tuple[int, ...], list[Throughput]]) -> Table:
    titles = ["context", "streaming", "slots", "KV MiB", "ms/step", "tokens/s", "faster", "limit", "reached"]
    on_gpu = found[()][0].gpu_milliseconds is not None
    table = measurement_table(*titles, *(["GPU ms", "faster by it"] if on_gpu else []))
    for number, context in enumerate(lengths):
        full = found[()][number]
        for lazy, measured in found.items():
            ours = measured[number]
            row = [f"{context:,}", f"{len(lazy)}/{num_layers}", f"{ours.slots}", f"{ours.kv_bytes / 2**20:,.0f}"]
            row += [f"{ours.milliseconds:,.0f}", f"{ours.tokens_per_second:,.1f}"]
            if lazy:
                faster, limit = ours.tokens_per_second / full.tokens_per_second, ours.tokens_per_byte / full.tokens_per_byte
                row += [f"{faster:.2f}x", f"{limit:.2f}x", f"{100 * faster / limit:.0f} %"]
            else:
                row += ["", "", ""]
            if ours.gpu_milliseconds is not None and full.gpu_milliseconds is not None:
                by_gpu = ours.slots / ours.gpu_milliseconds / (full.slots / full.gpu_milliseconds)
                row += [f"{ours.gpu_milliseconds:,.1f}", f"{by_gpu:.2f}x" if lazy else ""]
            table.add_row(*row, end_section=lazy == list(found)[-1])
    return table
