"""Time until the first token: the engine reads a long prompt in chunks, hybrids against full attention, in one run.

The limit is that of operations: products of the weights for each token, and attention for each pair of a query and a key that it
sees. The share reached holds a time against the rate of a large product on this machine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lt_train.bench.base import Base, hybrid_spec
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.bench.roofline import MATRIX, product_rate
from lt_train.hybrid.kv_size import head_size
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.kv_store import KVStore, pages_for
from lt_train.inference.runner import ModelRunner
from lt_train.planning.compute import MULTIPLY_ADD, causal_pairs, streaming_pairs
from lt_train.runtime.devices import device_name, dtype_name
from lt_train.runtime.progress import show_progress

DEFAULT_LENGTHS = (4096, 16384)
DEFAULT_RATIOS = (0.5, 0.75)
WARM_UP = 64
"""Tokens of a prompt that is read before the first one that is timed."""


@dataclass(frozen=True)
class Prefill:
    """One model that reads one prompt. operations: of all its forward passes."""

    tokens: int
    seconds: float
    operations: int


@torch.inference_mode()
def time_prefill(model: HybridForCausalLM, tokens: int, chunk: int) -> Prefill:
    """Read a prompt of random tokens into an empty store, and compute the logits of the next token."""

    def read(count: int) -> float:
        store = KVStore(model, 1, pages_for(count + 1))
        runner = ModelRunner(model, store, chunk)
        prompt = torch.randint(model.config.vocab_size, (count,)).tolist()
        started = time.perf_counter()
        runner.prefill([(store.admit(count + 1), prompt)]).argmax(-1).tolist()  # waits for the device
        return time.perf_counter() - started

    read(min(WARM_UP, tokens))
    return Prefill(tokens, read(tokens), prefill_operations(model, tokens))


def prefill_operations(model: HybridForCausalLM, tokens: int) -> int:
    """The head computes one token; experts count where they are linear modules."""
    spec, queries = model.spec, model.config.num_attention_heads * head_size(model.config.to_dict())
    weights = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, nn.Linear))
    streaming = len(spec.lazy_layers)
    pairs = (len(spec.full_in_base) - streaming) * causal_pairs(tokens) + streaming * streaming_pairs(tokens, spec.window)
    pairs += len(spec.sliding_layers) * streaming_pairs(tokens, spec.sliding_window)
    return MULTIPLY_ADD * (weights * tokens + model.lm_head.weight.numel() + 2 * queries * pairs)


def bench_prefill(
    base: Base, ratios: Sequence[float], w_sink: int, w_recent: int, lengths: Sequence[int], chunk: int, console: Console
) -> None:
    """Print the table, of layers with full attention in the base.

    Args:
        chunk: tokens of one forward pass.

    Raises:
        UserError: there is no such model, or no layer or every layer would stream.
    """
    config = base.config()
    specs = [hybrid_spec(config, ratio, w_sink, w_recent) for ratio in (0, *ratios)]
    found: dict[tuple[int, ...], list[Prefill]] = {}
    with show_progress("timing", total=len(specs) * len(lengths)) as bar:
        for spec in specs:
            hybrid, lazy = base.for_inference(spec), spec.lazy_layers
            if not found:
                rate = product_rate(MATRIX[hybrid.device.type], hybrid.dtype)
            for tokens in lengths:
                found.setdefault(lazy, []).append(time_prefill(hybrid, tokens, chunk))
                bar.advance()
            about = f"{base.name}, {hybrid.num_parameters() / 1e6:,.1f} M parameters, {dtype_name(hybrid.dtype)}"
            about += f" on {device_name(hybrid.device)}"
            del hybrid
    print_lines(console, f"{about}; one prompt in chunks of {chunk:,} tokens, read once; w_sink {w_sink}, w_recent {w_recent}")
    console.print(_table(len(specs[0].full_in_base), lengths, found, rate))
    print_lines(
        console,
        "limit: operations of full attention by those of the hybrid\n"
        f"of product: the share of the rate of a large product, {rate / 1e9:,.0f} GFLOP/s, measured before",
    )


def _table(num_layers: int, lengths: Sequence[int], found: dict[tuple[int, ...], list[Prefill]], rate: float) -> Table:
    table = measurement_table("tokens", "lazy", "s", "tokens/s", "GFLOP", "of product", "faster", "limit", "reached")
    for number, tokens in enumerate(lengths):
        full = found[()][number]
        for lazy, measured in found.items():
            ours = measured[number]
            row = [f"{tokens:,}", f"{len(lazy)}/{num_layers}", f"{ours.seconds:,.1f}", f"{tokens / ours.seconds:,.0f}"]
            row += [f"{ours.operations / 1e9:,.0f}", f"{100 * ours.operations / ours.seconds / rate:.0f} %"]
            if lazy:
                faster, limit = full.seconds / ours.seconds, full.operations / ours.operations
                row += [f"{faster:.2f}x", f"{limit:.2f}x", f"{100 * faster / limit:.0f} %"]
            table.add_row(*row, end_section=lazy == list(found)[-1])
    return table
