"""The choice of the layers that stream at the end of each prompt: LightTransfer-Test (arXiv 2410.13846, Section 3.2).

While a prompt is read, layer by layer, a priority queue holds its least lazy layers so far. The layer that leaves it streams from
then on. At the end the queue holds the same layers as a choice among all of them would.
"""

import heapq
from dataclasses import dataclass, field

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.errors import UserError


@dataclass(frozen=True)
class PerPrompt:
    """How each prompt chooses: its `keep` least lazy layers stay full.

    Args:
        w_last: last queries of a prompt that the lazy ratio averages over.
    """

    keep: int
    w_last: int

    def check(self, model: HybridForCausalLM) -> None:
        """
        Raises:
            UserError: no layer or every layer would stay full, or layers or heads that stream already.
        """
        spec = model.spec
        if spec.sliding_layers:
            raise UserError(
                f"per_prompt: layers {list(spec.sliding_layers)} of this base see {spec.sliding_window:,} tokens from the start, "
                "and the cache of prompts that choose their layers has no such layers. Fix: choose layers for all prompts "
                "(hybrid.select: static)"
            )
        if model.config.base_has_sinks:
            raise UserError(
                "per_prompt: each layer of this base has learned sinks, which prompts that choose their layers do not compute. "
                "Fix: choose layers for all prompts (hybrid.select: static)"
            )
        if not 0 < self.keep < spec.num_layers:
            raise UserError(
                f"per_prompt.keep: {self.keep}: of {spec.num_layers} layers, all or none would stay full. "
                f"Fix: set it from 1 to {spec.num_layers - 1}"
            )
        if spec.streams:
            layers = sorted([*spec.lazy_layers, *(layer for layer, _ in spec.split_layers)])
            raise UserError(
                f"per_prompt: layers {layers} of this model stream already. Fix: load the base, where every layer is full"
            )


@dataclass
class LayerQueue:
    """The layers of one prompt: at most `keep` stay full, and the others stream. They come in order, each once.

    Attributes:
        full: (-lazy ratio, layer) of the layers that stay full: a heap, the laziest first and the lower of equally lazy ones.
    """

    keep: int
    streaming: set[int] = field(default_factory=set)
    full: list[tuple[float, int]] = field(default_factory=list)

    def add(self, layer: int, lazy_ratio: float) -> int | None:
        """Returns the layer that streams from now on: this one, an earlier one, or none while fewer than `keep` are full."""
        heapq.heappush(self.full, (-lazy_ratio, layer))
        if len(self.full) <= self.keep:
            return None
        _, leaving = heapq.heappop(self.full)
        self.streaming.add(leaving)
        return leaving
