"""A profile of decoding steps: every operator's own time, by the part of the model that called it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from lt_train.bench.printing import measurement_table
from lt_train.inference.packed_weights import PackedLinear
from lt_train.inference.requests import Sampling
from lt_train.inference.runner import ModelRunner
from lt_train.inference.sampler import choose_tokens

PROFILED_STEPS = 3
_GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=1)
PARTS = ("products", "attention", "writes", "sampling", "other", "python")
PRODUCTS, ATTENTION, WRITES, SAMPLING, OTHER, PYTHON = PARTS
LEGEND = (
    "ms of a step: products of activations and weights; attention, with rotary embeddings; writes of new keys and values; "
    "sampling; other operators: norms, activations, embedding; python: between operators, and what the profiler adds to it"
)
WRITING = ("aten::index_put_", "aten::_index_put_impl_")


@torch.inference_mode()
def profile_steps(runner: ModelRunner, ids: Sequence[int]) -> dict[str, float]:
    """Milliseconds of a step by PARTS, of greedy decoding: of the CPU, or of the GPU's kernels, which Python starts here."""
    runner.graphs = None  # a graph's kernels belong to no part
    on_gpu = runner.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with parts_recorded(runner.model), profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            with record_function(OTHER):
                logits_BV = runner.step(ids)
                with record_function(SAMPLING):
                    choose_tokens(logits_BV, _GREEDY, [], [])
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiled.events():
        if (part := _part(event)) is not None:
            found[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / PROFILED_STEPS
    return found


@contextmanager
def parts_recorded(model: nn.Module) -> Iterator[None]:
    """While the block runs, the profiler sees which part of the model is computing."""
    open_parts: list[record_function] = []

    def enter(part: str) -> None:
        open_parts.append(record_function(part))
        open_parts[-1].__enter__()

    def leave() -> None:
        open_parts.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            part = _part_of_module(name, module)
            if part is not None:
                before = module.register_forward_pre_hook(lambda module, args, part=part: enter(part))
                after = module.register_forward_hook(lambda module, args, output: leave())
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield


def profile_table(num_layers: int, rows: Sequence[tuple[int, int, dict[str, float]]]) -> Table:
    """rows: context, streaming layers, and milliseconds by part."""
    table = measurement_table("context", "lazy", *PARTS)
    for context, lazy, found in rows:
        table.add_row(f"{context:,}", f"{lazy}/{num_layers}", *(f"{found[part]:,.1f}" for part in PARTS))
    return table


def _part_of_module(name: str, module: nn.Module) -> str | None:
    last = name.rsplit(".", 1)[-1]
    if isinstance(module, PackedLinear) or (isinstance(module, nn.Linear) and last != "linear"):
        return PRODUCTS
    if last == "self_attn" or last == "rotary_emb":
        return ATTENTION
    return OTHER if "norm" in last or last == "mlp" else None


def _part(event: FunctionEvent) -> str | None:
    """The innermost part around an operator; None for what is outside of steps. A part's own time is Python's."""
    if event.name in PARTS:
        return PYTHON
    if event.name in WRITING:
        return WRITES
    around: Any = event
    while around is not None and around.name not in PARTS:
        around = around.cpu_parent
    return None if around is None else around.name
