"""The loss of a distilled training: (1 - weight) x SFT + weight x (temperature² x KL(teacher || student) + hidden_weight x hidden).

All of it over answer tokens, and divided by the answer tokens of the whole optimizer step, so that neither the number of processes
nor that of accumulated micro-batches changes it.

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
class Part:
    """What a forward pass of the student adds to the loss, summed over its answer tokens."""

    tokens: Tensor
    kl: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Distillation:
    """A teacher beside the training of `hybrid`.

    Attributes:
        layers: those whose outputs are compared with the teacher's.
    """

    settings: Distill
    teacher: Teacher
    hybrid: HybridForCausalLM
    layers: tuple[int, ...] = ()
    means: "Means" = field(default_factory=lambda: Means())

    @contextmanager
    def beside(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[Part]:
        """Ask the teacher; then, while the block runs, a forward pass of `model` on the same batch leaves its part in what is
        yielded. It is made inside that forward pass, in its mixed precision and while DeepSpeed holds the head's weights.
        """
        answers_BT = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        answers_BT[:, :-1] = inputs["labels"][:, 1:] != IGNORED
        targets = self.teacher.targets(model, inputs, answers_BT)
        part = Part(tokens=answers_BT.sum())

        def compare(module: nn.Module, args: Any, output: Any) -> None:
            part.kl = targets.divergence(states.final_AH, self.hybrid.lm_head)
            part.hidden = hidden_difference(states.layers, targets) if self.layers else None

        with recorded(self.hybrid, answers_BT, self.layers) as states:
            hook = self.hybrid.model.register_forward_hook(compare)  # runs after the one that records
            try:
                yield part
            finally:
                hook.remove()

    def loss(self, sft: Tensor, part: Part, scale: Tensor | float) -> Tensor:
        """
        Args:
            sft: as the trainer scales it. scale: by which sums over answer tokens become so.
        """
        given = self.settings
        kl = part.kl * scale
        taught = given.temperature**2 * kl
        hidden = None if part.hidden is None else part.hidden * scale
        if hidden is not None:
            taught = taught + given.hidden_weight * hidden
        self.means.add(sft_loss=sft, kl=kl, hidden_difference=hidden)
        if given.weight == 1:  # no backward pass through a loss that counts nothing
            return taught
        return (1 - given.weight) * sft + given.weight * taught


def hidden_difference(student: dict[int, Tensor], targets: Targets) -> Tensor:
    """|student - teacher|² / |teacher|² of each answer token's layer output, mean over layers, summed over tokens: without a unit,
    so that layers with large activations do not outweigh the others.
    """
    per_layer = []
    for layer, taught_AH in targets.layers.items():
        difference_AH = student[layer].float() - taught_AH.float()
        per_layer.append((difference_AH.square().sum(-1) / taught_AH.float().square().sum(-1)).sum())
    return torch.stack(per_layer).mean()


class Means:
    """The parts of the loss since they were last logged, as means over optimizer steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, **parts: Tensor | None) -> None:
        for name, value in parts.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def take(self, steps: int) -> dict[str, Tensor]:
        """Of this process; the next ones start anew."""
        taken = {name: total / steps for name, total in self.sums.items()}
        self.sums = {}
        return taken
