"""Time of one more token after 1K, 8K, 32K tokens: the hybrid against the same weights with full attention, in one run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from lt_train.bench.base import Base, hybrid_spec, of_full_layers
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.devices import device_name, dtype_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress

DEFAULT_LENGTHS = (1024, 8192, 32768)
TIMED_TOKENS = 64
"""A time is the median over this number of tokens up to a length."""


@dataclass(frozen=True)
class TokenTiming:
    tokens: int
    """Length of the sequence so far."""
    milliseconds: float
    """For one more token."""
    kv_bytes: int
    """Cached keys and values, without room for growth."""
    ring_tokens: int
    """The most cached tokens of any streaming layer; 0 without streaming layers."""


@torch.inference_mode()
def time_decoding(model: HybridForCausalLM, lengths: Sequence[int], progress: bool = True) -> list[TokenTiming]:
    """Generate greedily, one sequence, until the longest of `lengths`, and time the tokens before each of them."""
    cache = HybridCache(model.spec)
    timings: list[TokenTiming] = []
    recent: list[float] = []
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    name = "hybrid" if model.spec.streams else "full attention"
    with show_progress(f"timing {name}", total=max(lengths), shown=progress) as bar:
        for length in range(1, max(lengths) + 1):
            started = time.perf_counter()
            token = model(token, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
            token.item()  # waits for the device
            recent = [*recent[-TIMED_TOKENS + 1 :], time.perf_counter() - started]
            if length in lengths:
                timings.append(TokenTiming(length, 1000 * median(recent), _bytes_in_use(cache), _ring_tokens(cache)))
            if length % 64 == 0:
                bar.update(length)
    return timings


def bench_growth(base: Base, ratio: float, w_sink: int, w_recent: int, lengths: Sequence[int], console: Console) -> None:
    """Print the table, of layers with full attention in the base.

    Raises:
        UserError: there is no such model, no layer or every layer would stream, or a length is below TIMED_TOKENS.
    """
    if min(lengths) < TIMED_TOKENS:
        raise UserError(
            f"--at: {min(lengths)}: below the {TIMED_TOKENS} tokens of which a time is the median. Fix: set at least {TIMED_TOKENS}"
        )
    config = base.config()
    specs = {"hybrid": hybrid_spec(config, ratio, w_sink, w_recent), "full": hybrid_spec(config, 0, w_sink, w_recent)}
    timings: dict[str, list[TokenTiming]] = {}
    for name, spec in specs.items():
        hybrid = base.for_inference(spec)
        timings[name] = time_decoding(hybrid, sorted(set(lengths)))
        parameters, dtype, device = hybrid.num_parameters(), hybrid.dtype, hybrid.device
        del hybrid
    title = (
        f"{base.name}, {parameters / 1e6:,.1f} M parameters, {dtype_name(dtype)} on {device_name(device)}; "
        f"{of_full_layers(specs['hybrid'])} stream, w_sink {w_sink}, w_recent {w_recent}; one sequence, medians of "
        f"{TIMED_TOKENS} tokens"
    )
    print_lines(console, title)
    console.print(_table(timings["hybrid"], timings["full"], parameters * dtype.itemsize))
    print_lines(
        console,
        "ms: for one more token; MiB: its KV cache; ring: cached tokens of a streaming layer; limit: weights and KV bytes of full "
        "attention by those of the hybrid, the ratio of memory traffic",
    )


def _table(hybrid: list[TokenTiming], full: list[TokenTiming], weight_bytes: int) -> Table:
    table = measurement_table("tokens", "hybrid ms", "full ms", "faster", "limit", "hybrid MiB", "full MiB", "ring")
    for ours, theirs in zip(hybrid, full, strict=True):
        table.add_row(
            f"{ours.tokens:,}",
            f"{ours.milliseconds:.2f}",
            f"{theirs.milliseconds:.2f}",
            f"{theirs.milliseconds / ours.milliseconds:.2f}x",
            f"{(weight_bytes + theirs.kv_bytes) / (weight_bytes + ours.kv_bytes):.2f}x",
            f"{ours.kv_bytes / 2**20:.1f}",
            f"{theirs.kv_bytes / 2**20:.1f}",
            f"{ours.ring_tokens:,}",
        )
    return table


def _bytes_in_use(cache: HybridCache) -> int:
    """Bytes of the cache in all layers; by `numel`, because the tensors are views of buffers with room for growth."""
    return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.parts)


def _ring_tokens(cache: HybridCache) -> int:
    parts = (part for layer in cache.spec.streaming_layers for part in cache.layers[layer].parts)
    return max((part.keys.shape[2] for part in parts if part.is_sliding), default=0)
