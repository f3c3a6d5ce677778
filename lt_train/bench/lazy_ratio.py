"""Time that the lazy ratios of all layers add to a forward pass over a prompt: both are timed in the same passes.

On a CPU seconds are those of all threads, so that other work on the machine counts little.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn

from lt_train.bench.base import Base, hybrid_spec
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.hybrid.views import FullView
from lt_train.inference.fused_attention import full_attention
from lt_train.inference.lazy_ratio import lazy_ratio
from lt_train.inference.observed_layers import run_observed
from lt_train.runtime.devices import device_name, dtype_name, wait_for
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress

DEFAULT_LENGTHS = (4096,)


@dataclass(frozen=True)
class RatioCost:
    """Seconds of one pass through all layers without lazy ratios, and of the ratios."""

    tokens: int
    forward: float
    ratios: float

    @property
    def added(self) -> float:
        return self.ratios / self.forward


@dataclass
class TimedView(FullView):
    """Full attention, after which the lazy ratio of the layer is computed and timed."""

    spec: HybridSpec = field(kw_only=True)
    w_last: int = field(kw_only=True)
    seconds: float = 0.0

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        out_BTHD, (lse_BHT,) = full_attention(self, module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)
        started = clock(q_BHTD.device)
        lazy_ratio(q_BHTD, k_BGKD, scaling, self.spec.w_sink, self.spec.w_recent, self.w_last, lse_BHT=lse_BHT)
        self.seconds = clock(q_BHTD.device) - started
        return out_BTHD


def clock(device: torch.device) -> float:
    """Seconds so far: of all threads of this process on a CPU, else by the clock, once the device is done."""
    if device.type == "cpu":
        return time.process_time()
    wait_for(device)
    return time.perf_counter()


def time_ratios(
    model: HybridForCausalLM, tokens: int, w_last: int, runs: int, advance: Callable[[], object] = lambda: None
) -> RatioCost:
    """The pass of which the ratios add the median fraction, of `runs` after one that is not counted."""
    ids = torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[RatioCost] = []
    for _ in range(1 + runs):
        started = clock(model.device)
        views = run_observed(model, ids, lambda _, full: TimedView(full.documents, full.kernel, spec=model.spec, w_last=w_last))
        ratios = sum(view.seconds for view in views)
        found.append(RatioCost(tokens, clock(model.device) - started - ratios, ratios))
        advance()
    middle = median(cost.added for cost in found[1:])
    return min(found[1:], key=lambda cost: abs(cost.added - middle))


def bench_lazy_ratio(
    base: Base, lengths: Sequence[int], w_last: int, w_sink: int, w_recent: int, runs: int, console: Console
) -> None:
    """Print the table.

    Raises:
        UserError: there is no such model, a size below 1, or a length within the window, where every ratio is 1.
    """
    for option, value, least in (("--w-last", w_last, 1), ("--runs", runs, 1), ("--at", min(lengths), w_sink + w_recent + 1)):
        if value < least:
            raise UserError(f"{option}: {value}: too small. Fix: set at least {least}")
    model = base.for_inference(hybrid_spec(base.config(), 0, w_sink, w_recent))
    lengths = sorted(set(lengths))
    table = measurement_table("tokens", "forward s", "ratios s", "added")
    with show_progress("timing", total=len(lengths) * (1 + runs)) as bar:
        for length in lengths:
            cost = time_ratios(model, length, w_last, runs, bar.advance)
            table.add_row(f"{length:,}", f"{cost.forward:,.2f}", f"{cost.ratios:,.3f}", f"{cost.added:.2%}")
    print_lines(
        console,
        f"{base.name}, {dtype_name(model.dtype)} on {device_name(model.device)}; one prompt; w_sink {w_sink}, w_recent "
        f"{w_recent:,}, w_last {w_last}; medians of {runs}",
    )
    console.print(table)
    print_lines(console, "forward: all layers, without the head; added: by the lazy ratio of every layer (the paper: 0.58 % at 4K)")
