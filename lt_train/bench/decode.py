"""Tokens per second with a given KV budget: hybrids against full attention, all by the engine, in one run.

Memory traffic sets the limit: a step reads all weights once, and every sequence's keys and values once. With equal budgets a
hybrid's step has more sequences; `limit` is the ratio of its tokens per byte to those of full attention. The roofline holds a step
against the machine itself: what it reads at the speed of a large copy, what it multiplies at that of a large product.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lt_train.bench.base import Base, hybrid_spec
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.bench.roofline import Rates, measure_rates
from lt_train.bench.speculation import DraftRounds
from lt_train.bench.step_profile import LEGEND, PROFILED_STEPS, profile_steps, profile_table
from lt_train.bench.vllm_speed import VllmStep, check_vllm, vllm_steps
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.kv_store import KVStore, PagedLayer, kv_sizes, pages_for
from lt_train.inference.packed_weights import obstacle_to_packing
from lt_train.inference.runner import ModelRunner
from lt_train.inference.sampler import likeliest_tokens
from lt_train.inference.step_graphs import STEPS_BEFORE_CAPTURE, until_captured
from lt_train.runtime.devices import device_name, dtype_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress
from lt_train.runtime.units import MIB, format_bytes

DEFAULT_LENGTHS = (2048, 8192, 16384)
DEFAULT_RATIOS = (0.5, 0.75)
TIMED_STEPS = 16
"""A time is the median over this number of steps."""
STEPS = STEPS_BEFORE_CAPTURE + 1 + TIMED_STEPS + 1 + PROFILED_STEPS  # one is for the profiler of a GPU
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
    roofline_milliseconds: float | None = None
    """Of a step, by the machine's rates."""
    obstacle: str | None = None
    """Why the weights were not packed; None where they were."""
    parts: dict[str, float] | None = None
    """Milliseconds of a step by part, where it was profiled."""

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.slots / self.milliseconds

    @property
    def tokens_per_byte(self) -> float:
        return self.slots / self.moved_bytes


@torch.inference_mode()
def throughput(
    model: HybridForCausalLM, context: int, budget: int, rates: Rates | None = None, profiled: bool = False
) -> Throughput:
    """Fill the budget with sequences of `context` tokens and time steps of all of them.

    Their keys and values are random: a step's time does not depend on them, and prefill would take hours on a CPU.

    Raises:
        UserError: the budget is below one such sequence.
    """
    sizes = kv_sizes(model)
    slots = slots_in(budget, context, sizes.sequence(context + STEPS))
    obstacle = obstacle_to_packing(model, slots)
    store = KVStore(model, slots, slots * pages_for(context + STEPS))
    fill(store, slots, context)
    runner = ModelRunner(model, store, prefill_chunk=1)
    ids = [1] * slots
    until_captured(runner.graphs, lambda: runner.step(ids))
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        likeliest_tokens(runner.step(ids))  # waits for the device
        times.append(time.perf_counter() - started)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = slots * sizes.sequence(context)
    return Throughput(
        slots,
        held,
        weights + held,
        1000 * median(times),
        gpu_milliseconds(lambda: runner.step(ids)) if model.device.type == "cuda" else None,
        1000 * rates.step_seconds(model, slots, held) if rates is not None else None,
        obstacle,
        profile_steps(runner, ids) if profiled else None,
    )


def slots_in(budget: int, context: int, sequence: int) -> int:
    """
    Raises:
        UserError: the budget is below one sequence.
    """
    if budget < sequence:
        raise UserError(budget_too_small(budget, context, sequence))
    return budget // sequence


def gpu_milliseconds(step: Callable[[], object]) -> float:
    """Milliseconds of the GPU's kernels and copies in one step, added up."""
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
    for held in store.held:
        used = slice(None) if isinstance(held, PagedLayer) else slice(slots)
        held.keys[used].normal_()
        held.values[used].normal_()


def bench_decode(
    base: Base,
    ratios: Sequence[float],
    w_sink: int,
    w_recent: int,
    lengths: Sequence[int],
    budget: int,
    console: Console,
    drafts: DraftRounds | None = None,
    profiled: bool = False,
    vllm: Path | None = None,
) -> None:
    """Print the table, and that of `drafts`, of layers with full attention in the base.

    Args:
        profiled: print where the time of each row's step goes, too.
        vllm: the python of vLLM's environment, which decodes the base beside the engine.

    Raises:
        UserError: there is no such model, no layer or every layer would stream, the budget is below one sequence, or
            vLLM fails; see also `DraftRounds.time`.
    """
    config = base.config()
    specs = [hybrid_spec(config, ratio, w_sink, w_recent) for ratio in (0, *ratios)]
    num_layers = len(specs[0].full_in_base)
    if vllm is not None:
        check_vllm(base, vllm, lengths)
    found: dict[tuple[int, ...], list[Throughput]] = {}
    with show_progress("timing", total=len(specs) * len(lengths)) as bar:
        for spec in specs:
            hybrid, lazy = base.for_inference(spec), spec.lazy_layers
            if not found:
                rates, vocab_size = measure_rates(hybrid.dtype), hybrid.config.vocab_size
            for context in lengths:
                found.setdefault(lazy, []).append(throughput(hybrid, context, budget, rates, profiled))
                bar.advance()
            if drafts is not None:
                plain = [(at_length.slots, at_length.tokens_per_second) for at_length in found[lazy]]
                drafts.time(hybrid, base, lengths, budget, plain, rates)
            about = f"{base.name}, {hybrid.num_parameters() / 1e6:,.1f} M parameters, {dtype_name(hybrid.dtype)}"
            about += f" on {device_name(hybrid.device)}"
            del hybrid
    print_lines(
        console,
        f"{about}; KV budget {budget / 2**20:,.0f} MiB for each, w_sink {w_sink}, w_recent {w_recent}; medians of {TIMED_STEPS} "
        "steps, full slots, random keys and values",
    )
    print_lines(console, weights_line([row.obstacle for rows in found.values() for row in rows]))
    by_vllm = None
    if vllm is not None:
        slots = {context: full.slots for context, full in zip(lengths, found[()], strict=True)}
        by_vllm = vllm_steps(base, vllm, slots, budget, vocab_size)
    console.print(throughput_table(num_layers, lengths, found, by_vllm))
    legend = "limit: tokens per byte moved (weights, keys and values) by those of full attention; reached: faster / limit"
    print_lines(console, legend)
    print_lines(
        console,
        f"roof: ms of a step at the rates of a large copy, {rates.bandwidth / 1e9:,.1f} GB/s, and of a large product, "
        f"{rates.products / 1e9:,.0f} GFLOP/s, both measured before it; of it: the share reached",
    )
    if by_vllm is not None:
        print_lines(
            console,
            "vLLM: the base, with as many threads and bytes of KV cache, and as many of the sequences as it holds in them; "
            "faster: than full attention here",
        )
    if found[()][0].gpu_milliseconds is not None:
        console.print(gpu_table(num_layers, lengths, found))
        print_lines(
            console, "GPU ms: of a step, while the GPU computes; else it waits for Python. faster by it: tokens per GPU second"
        )
    if profiled:
        rows = [(context, len(lazy), rows[n].parts or {}) for n, context in enumerate(lengths) for lazy, rows in found.items()]
        console.print(profile_table(num_layers, rows))
        print_lines(console, LEGEND)
    print_lines(console, PAPER)
    if drafts is not None:
        drafts.print(console)


def weights_line(obstacles: Sequence[str | None]) -> str:
    """Whether the rows of a table computed with packed weights, and the reasons where not."""
    reasons = sorted({reason for reason in obstacles if reason is not None})
    if not reasons:
        return "weights: packed"
    return f"weights: as they are stored{', or packed' if None in obstacles else ''} ({'; '.join(reasons)})"


def throughput_table(
    num_layers: int,
    lengths: Sequence[int],
    found: dict[tuple[int, ...], list[Throughput]],
    by_vllm: dict[int, VllmStep] | None = None,
) -> Table:
    """by_vllm: by context, with at most the slots of full attention."""
    table = measurement_table("context", "lazy", "slots", "ms", "roof", "of it", "tokens/s", "faster", "limit", "reached")
    for number, context in enumerate(lengths):
        full = found[()][number]
        for lazy, measured in found.items():
            ours = measured[number]
            row = [f"{context:,}", f"{len(lazy)}/{num_layers}", f"{ours.slots}", f"{ours.milliseconds:,.0f}"]
            roof = ours.roofline_milliseconds
            row += ["", ""] if roof is None else [f"{roof:,.0f}", f"{100 * roof / ours.milliseconds:.0f} %"]
            row.append(f"{ours.tokens_per_second:,.1f}")
            if lazy:
                faster, limit = ours.tokens_per_second / full.tokens_per_second, ours.tokens_per_byte / full.tokens_per_byte
                row += [f"{faster:.2f}x", f"{limit:.2f}x", f"{100 * faster / limit:.0f} %"]
            table.add_row(*row, end_section=by_vllm is None and lazy == list(found)[-1])
        if by_vllm is not None:
            step = by_vllm[context]
            rate = f"{step.tokens_per_second:,.1f}"
            by_full = f"{step.tokens_per_second / full.tokens_per_second:.2f}x"
            row = [f"{context:,}", "vLLM", f"{step.slots}", f"{step.milliseconds:,.0f}", "", "", rate, by_full]
            table.add_row(*row, end_section=True)
    return table


def gpu_table(num_layers: int, lengths: Sequence[int], found: dict[tuple[int, ...], list[Throughput]]) -> Table:
    table = measurement_table("context", "lazy", "GPU ms", "faster by it")
    for number, context in enumerate(lengths):
        full = found[()][number]
        for lazy, measured in found.items():
            ours = measured[number]
            assert ours.gpu_milliseconds is not None and full.gpu_milliseconds is not None
            by_gpu = ours.slots / ours.gpu_milliseconds / (full.slots / full.gpu_milliseconds)
            row = (f"{context:,}", f"{len(lazy)}/{num_layers}", f"{ours.gpu_milliseconds:,.1f}", f"{by_gpu:.2f}x" if lazy else "")
            table.add_row(*row, end_section=lazy == list(found)[-1])
    return table
