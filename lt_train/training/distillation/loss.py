"""The loss of a distilled training: (1 - weight) x SFT + weight x (temperature² x KL(teacher || student) + hidden_weight x hidden).

Each term is a sum over answer tokens, divided by the answer tokens of the entire optimizer step, so that it depends neither on the
number of processes nor on that of accumulated micro-batches.

Legend: A answer tokens of a batch, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lt_train.dataset.examples import IGNORED
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.recipe.schema import Distill
from lt_train.training.distillation.teacher import Targets, Teacher, recorded


@dataclass
class Terms:
    """The distillation terms of one forward pass of the student, summed over its answer tokens. `kl` is set by that pass."""

    tokens: Tensor
    kl: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Distillation:
    """The distillation of a teacher into `hybrid`.

    Attributes:
        layers: the layers whose outputs are compared with the teacher's.
    """

    settings: Distill
    teacher: Teacher
    hybrid: HybridForCausalLM
    layers: tuple[int, ...] = ()
    means: "Means" = field(default_factory=lambda: Means())

    @contextmanager
    def terms_of(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[Terms]:
        """Run the teacher; while the block runs, a forward pass of `model` on the same batch fills the yielded terms.

        They are computed inside that forward pass: in its mixed precision, and while DeepSpeed has the head's weights gathered.
        """
        answers_BT = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        answers_BT[:, :-1] = inputs["labels"][:, 1:] != IGNORED
        targets = self.teacher.targets(model, inputs, answers_BT)
        terms = Terms(tokens=answers_BT.sum())

        def compare(module: nn.Module, args: Any, output: Any) -> None:
            terms.kl = targets.divergence(states.final_AH, self.hybrid.lm_head)
            terms.hidden = hidden_difference(states.layers, targets) if self.layers else None

        with recorded(self.hybrid, answers_BT, self.layers) as states:
            hook = self.hybrid.model.register_forward_hook(compare)  # runs after the hook that records
            try:
                yield terms
            finally:
                hook.remove()

    def loss(self, sft: Tensor, terms: Terms, scale: Tensor | float) -> Tensor:
        """
        Args:
            sft: the SFT loss as the trainer scales it. scale: the factor that scales sums over answer tokens in the same way.
        """
        assert terms.kl is not None, "the forward pass fills the terms"
        given = self.settings
        kl = terms.kl * scale
        distilled = given.temperature**2 * kl
        hidden = None if terms.hidden is None else terms.hidden * scale
        if hidden is not None:
            distilled = distilled + given.hidden_weight * hidden
        self.means.add(sft_loss=sft, kl=kl, hidden_difference=hidden)
        if given.weight == 1:  # no backward pass through a loss of weight 0
            return distilled
        return (1 - given.weight) * sft + given.weight * distilled


def hidden_difference(student: dict[int, Tensor], targets: Targets) -> Tensor:
    """|student - teacher|² / |teacher|² of each answer token's layer output, mean over layers, summed over tokens.

    It is relative, so that layers with large activations do not outweigh the others.
    """
    per_layer = []
    for layer, target_AH in targets.layers.items():
        difference_AH = student[layer].float() - target_AH.float()
        per_layer.append((difference_AH.square().sum(-1) / target_AH.float().square().sum(-1)).sum())
    return torch.stack(per_layer).mean()


class Means:
    """The terms of the loss since the last log, as means over optimizer steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, **terms: Tensor | None) -> None:
        for name, value in terms.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take(self, steps: int) -> dict[str, Tensor]:
        """The means of this process over the last `steps` steps; the sums restart at 0."""
        taken = {name: total / steps for name, total in self.sums.items()}
        self.sums = {}
        return taken
