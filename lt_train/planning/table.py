"""The plan as tables: each size with its source, and at the end whether the recipe fits, or what to change."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lt_train.planning.compute import HOUR
from lt_train.planning.plan import RecipePlan, TrainingPlan
from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape
from lt_train.runtime.units import format_bytes, format_duration
from lt_train.selection.chosen import streaming_count
from lt_train.selection.quadrature import MOST_POINTS

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def show_plan(plan: RecipePlan, console: Console) -> None:
    _print_line(console, f"{plan.recipe.name} on {_machine(plan.machine)}", bold=True)
    _print_rows(console, _model(plan))
    _print_rows(console, _profile(plan))
    training = plan.training
    if training is not None:
        _print_rows(console, _training(training, plan.shape))
        console.print(_memory_table(training))
        if training.options:
            console.print(_options_table(training))
        _print_rows(console, _work(training))
    _print_rows(console, _evaluation(plan))
    for line in verdict(plan):
        _print_line(console, line, bold=True)


def _machine(machine: Machine) -> str:
    memory = format_bytes(machine.memory)
    if machine.cpu:
        return f"{machine.gpus} process{'es' if machine.gpus > 1 else ''} on a CPU with {memory} each"
    usable = format_bytes(machine.usable)
    return f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} of {memory}, of which {usable} are usable"


def _model(plan: RecipePlan) -> list[tuple[str, str]]:
    shape = plan.shape
    spec = shape.spec
    sinks = "learned sinks" if spec.learned_sinks else f"{spec.w_sink} sinks"
    streams = f"{streaming_count(spec, shape.key_heads)} stream ({sinks}, window {spec.w_recent:,})"
    active = f", of which a token uses {shape.active_parameters:,}" if shape.experts else ""
    rows = [("model", f"{plan.recipe.model.base}: {shape.base_parameters:,} parameters{active}; {streams}")]
    if spec.sliding_layers:
        rows.append(("", f"{len(spec.sliding_layers)} other layers have a window of {spec.sliding_window:,} tokens in the base"))
    if spec.split_layers and plan.recipe.hybrid.streaming_kv_heads is None:
        bound = f"at most {len(spec.streaming_layers)} layers have some of them; adapters and activations are counted for all"
        rows.append(("", bound))
    if plan.proof is not None:
        rows += [("family", plan.proof), ("", "memory and operations are counted as if its layers were Llama's or Qwen3-MoE's")]
    return rows


def _profile(plan: RecipePlan) -> list[tuple[str, str]]:
    needed = plan.profile
    if needed is None:
        return []
    over = "on one GPU" if needed.gpus == 1 else f"on the fullest of {needed.gpus} GPUs, while the other processes wait"
    over = "in the first process" if plan.machine.cpu else over
    sizes = (
        f"{format_bytes(needed.weights)} of weights, {format_bytes(needed.states)} of hidden states, "
        f"{format_bytes(needed.workspace)} of workspace for samples of up to {needed.length:,} tokens"
    )
    rows = [("profile", f"{format_bytes(needed.peak)} {over}: {sizes}")]
    if not plan.machine.cpu:
        samples = plan.recipe.hybrid.calibration.samples
        least, most = (format_duration(HOUR * hours) for hours in plan.profile_hours)
        time = least if least == most else f"{least}, or up to {most} where gates takes gradients at {MOST_POINTS} points,"
        at = f"{100 * plan.machine.efficiency:.0f} % of {plan.machine.tflops:,.0f} TFLOP/s, one GPU at a time"
        rows.append(("", f"{time} for {samples} samples of {needed.length:,} tokens at {at}"))
    return rows


def _training(training: TrainingPlan, shape: ModelShape) -> list[tuple[str, str]]:
    setup = training.setup
    adapters = ", all of them in adapters" if shape.adapters == shape.trainable else ""
    processes = "in each process" if setup.sequence_parallel == 1 else f"divided among {setup.sequence_parallel} processes"
    step = "" if training.accumulation is None else f", {training.accumulation} such micro-batches per optimizer step"
    return [
        ("trained", f"{shape.trainable:,} parameters, {100 * shape.trainable / shape.parameters:.3g} %{adapters}"),
        ("dtype", f"{'bf16' if setup.bf16 else 'fp32'} with {setup.sharding.name}"),
        ("batch", f"{setup.micro_batch} x {setup.length:,} tokens {processes}{step}"),
    ]


def _memory_table(training: TrainingPlan) -> Table:
    memory = training.memory
    table = _table("memory of each process", "", "")
    for allocation in memory.allocations:
        elsewhere = "" if memory.phase in allocation.phases else "; not at the peak"
        table.add_row(allocation.name, format_bytes(allocation.size), allocation.source + elsewhere)
    table.add_section()
    table.add_row("peak", format_bytes(memory.peak), memory.phase.value, style="bold")
    if memory.host:
        table.add_row("host memory", format_bytes(memory.host), "summed over all processes")
    return table


def _options_table(training: TrainingPlan) -> Table:
    table = _table("train.deepspeed", "micro-batch 1", "largest micro-batch that fits")
    for option in training.options:
        host = f", {format_bytes(option.host)} of host memory" if option.host else ""
        this = "; as in this recipe" if option.sharding == training.setup.sharding else ""
        details = f"{option.micro_batch or 'none'} ({option.sharding.name}{host}{this})"
        table.add_row(option.file, format_bytes(option.peak), details)
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[1].justify = "right"
    return table


def _work(training: TrainingPlan) -> list[tuple[str, str]]:
    work, compute, machine = training.work, training.compute, training.setup.machine
    if work is None or compute is None:
        return [("tokens", "unknown: the data are not local. Fix: give --samples and --mean-tokens, or set data.limit")]
    epochs = "1 epoch" if work.epochs == 1 else f"{work.epochs:.3g} epochs"
    samples = f"{len(work.samples.lengths):,} samples of {work.samples.mean:,.0f} tokens, {epochs}"
    total, linear, attention = (_operations(count) for count in (compute.total, compute.linear, compute.attention))
    full = f"{_operations(compute.linear + compute.full_attention)} without streaming layers"
    rows = [
        ("tokens", f"{work.tokens:,.0f} in {work.steps:,} optimizer steps: {samples} ({work.samples.source})"),
        ("operations", f"{total}: {linear} linear, {attention} attention; {full}"),
    ]
    if not machine.cpu:
        peak = f"{machine.tflops:,.0f} TFLOP/s per GPU"
        rows.append(("time", f"{format_duration(3600 * compute.hours(machine))} at {100 * machine.efficiency:.0f} % of {peak}"))
    return rows


def _operations(count: float) -> str:
    """Floating-point operations, such as "17.25 EFLOP"."""
    power = min(max(int(math.log10(max(count, 1))) // 3, 0), len(_PREFIXES) - 1)
    return f"{count / 1000**power:,.4g} {_PREFIXES[power]}FLOP"


def _evaluation(plan: RecipePlan) -> list[tuple[str, str]]:
    cache = plan.cache
    if cache is None:
        return []
    hybrid, full = cache.sequences
    sizes = f"{format_bytes(cache.hybrid)} for {cache.tokens:,} tokens, {format_bytes(cache.full)} without streaming layers"
    found = [
        ("KV cache", f"of a sequence of {cache.evaluation}: {sizes}; {hybrid:,} and {full:,} sequences fit beside the weights")
    ]
    if cache.vllm:
        lazy, *others = cache.vllm
        counts = ", ".join(f"{cache.vllm[count]:,} with {count}" for count in others)
        kind = "KV heads" if plan.shape.spec.split_layers else "layers"
        found.append(("in vLLM", f"{cache.vllm[lazy]:,} such sequences ({counts} streaming {kind}; it groups {kind})"))
    return found


def verdict(plan: RecipePlan) -> list[str]:
    training, lines = plan.training, _profile_verdict(plan)
    if training is None:
        return [*lines, "nothing is trained in this recipe"]
    if training.undivided is not None:
        lines.append(f"the batch cannot be divided: {training.undivided}")
    needed = f"{format_bytes(training.memory.peak)} of {format_bytes(plan.machine.usable)}"
    if training.fits:
        return [*lines, f"fits: {needed}"]
    lines.append(f"does not fit: {needed}, {training.memory.phase.value}")
    if not training.suggestions:
        return [
            *lines,
            "no single change makes it fit: combine LoRA, gradient checkpointing, sharding, a shorter data.max_length",
        ]
    return [*lines, "each of these changes alone makes it fit:", *(f"  {suggestion}" for suggestion in training.suggestions)]


def _profile_verdict(plan: RecipePlan) -> list[str]:
    if plan.profile is None or plan.profile_fits:
        return []
    needed = f"{format_bytes(plan.profile.peak)} of {format_bytes(plan.machine.usable)}"
    suggestions = [f"  {suggestion}" for suggestion in plan.profile_suggestions]
    return [f"scoring the layers does not fit: {needed}; each of these changes alone makes it fit:", *suggestions]


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    for label, text in rows:
        _print_line(console, f"{label:<11}{text}")


def _print_line(console: Console, text: str, bold: bool = False) -> None:
    console.print(text, style="bold" if bold else None, markup=False, highlight=False, soft_wrap=True)
