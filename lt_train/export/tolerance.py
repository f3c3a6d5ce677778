"""How far the logits of an export may be from those in memory: between what rounding changes and what a fault changes, as measured.

Shapes: B rows, T columns, K the last columns of a row (at most KEPT_COLUMNS), V vocab_size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lt_train.export.bare_process import COMPUTED_IN, KEPT_COLUMNS, NEW_TOKENS, computing_in, logits_of
from lt_train.hybrid.attention_kernels import AUTO
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.changed_config import changed

EXACT = torch.float64
MARGIN = 16.0
"""Other kernels of the same dtype round alike within this factor. A fault that changes logits by less is taken for rounding."""

BEYOND_WINDOW = 64  # columns
LARGEST_WINDOW_IN_A_BATCH = 192  # tokens; a longer prompt goes alone, for its logits' sake

Batch = tuple[Tensor, Tensor]
"""(input_ids, attention_mask), both [B, T]."""


@dataclass(frozen=True)
class LogitChanges:
    """Largest changes of a logit, on the longest prompt.

    Attributes:
        rounding: by computing in COMPUTED_IN instead of in fp64.
        faults: by each fault that an export could have, such as "a window shorter by one".
    """

    rounding: float
    faults: dict[str, float]

    @property
    def noticed(self) -> dict[str, float]:
        """The faults that change a logit by clearly more than rounding."""
        return {fault: change for fault, change in self.faults.items() if change > MARGIN * self.rounding}

    @property
    def tolerance(self) -> float:
        """The largest difference of a logit that is allowed: MARGIN times rounding, or where that comes near the least fault that
        can be noticed, the geometric mean of rounding and that fault.
        """
        between = [math.sqrt(self.rounding * change) for change in self.noticed.values()]
        return min([MARGIN * self.rounding, *between])


def check_batches(spec: HybridSpec, vocab_size: int, max_positions: int) -> list[Batch]:
    """Seeded random tokens: rows padded on the left, shorter than the sinks, than the window, and longer than both if it can be.

    The longest row is in the last batch.
    """
    window = max(spec.window, spec.sliding_window)
    longest = max(min(window + BEYOND_WINDOW, max_positions - NEW_TOKENS), 1)
    if window <= LARGEST_WINDOW_IN_A_BATCH:
        lengths = [[1, min(spec.window, longest), longest]]
    else:
        lengths = [[1, 17, min(64, longest)], [longest]]
    generator = torch.Generator().manual_seed(0)
    return [_left_padded(rows, vocab_size, generator) for rows in lengths]


def measure(model: HybridForCausalLM, batch: Batch, logits_BKV: Tensor) -> LogitChanges:
    """How much rounding and faults change a batch's logits, which are `logits_BKV` in COMPUTED_IN."""
    real_BK = batch[1][:, -KEPT_COLUMNS:].bool()

    def change(dtype: torch.dtype, **settings: Any) -> float:
        with computing_in(dtype, model), changed(model.config, **settings):
            return (logits_of(model, *batch) - logits_BKV)[real_BK].abs().max().item()

    w_sink, w_recent = model.spec.w_sink, model.spec.w_recent
    window, of_base = "w_recent" if model.spec.sliding_layers else "sliding_window", model.spec.sliding_window
    faults: dict[str, dict[str, Any]] = {"a window longer by one": {window: w_recent + 1}}
    if w_recent > 1:
        faults["a window shorter by one"] = {window: w_recent - 1}
    if of_base:
        faults["a window of the base longer by one"] = {"sliding_window": of_base + 1}
    if of_base > 1:
        faults["a window of the base shorter by one"] = {"sliding_window": of_base - 1}
    if w_sink > 0:
        faults["no sinks"] = {"w_sink": 0}
    if model.spec.learned_sinks:
        faults["no sinks"] = {"learned_sinks": False}
    if model.spec.split_layers:
        count = model.config.kv_heads
        others = [[(head + 1) % count for head in heads] for heads in model.spec.streaming_heads(count)]
        faults["other KV heads"] = {"streaming_kv_heads": others}
    rounding = change(EXACT, _experts_implementation="eager")  # of a mixture of experts: others have no products in fp64
    return LogitChanges(rounding, {fault: change(COMPUTED_IN, **settings) for fault, settings in faults.items()})


@contextmanager
def any_kernel(model: HybridForCausalLM) -> Iterator[None]:
    """While the block runs, attention is computed as `auto` chooses: the kernel that a recipe names need not know fp32 or fp64."""
    named = model.model.attention_kernel
    model.set_attention_kernel(AUTO)
    try:
        yield
    finally:
        model.set_attention_kernel(named)


def _left_padded(lengths: list[int], vocab_size: int, generator: torch.Generator) -> Batch:
    columns = torch.arange(max(lengths))
    mask = (columns[None] >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return torch.randint(vocab_size, mask.shape, generator=generator) * mask, mask
