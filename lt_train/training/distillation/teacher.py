"""What the model's own past self says on the answer tokens of a batch: the base, with full attention in every layer.

A teacher is asked before the student's forward pass and gives targets, which know their divergence from a student's hidden states.

Legend: B rows, T columns, A answer tokens of a batch (positions whose next token has a label), H hidden size, V vocabulary, K kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.training.distillation.top_k import StoredTopK, TopKDivergence

FORWARD_KL = 0.0  # TRL's beta: KL(teacher || student)


class Targets(Protocol):
    """A teacher's answers to one batch.

    Attributes:
        layers: layer -> the teacher's output of it (A, H), of the layers that were asked for.
    """

    layers: dict[int, Tensor]

    def divergence(self, hidden_AH: Tensor, lm_head: nn.Linear) -> Tensor:
        """KL(teacher || student), summed over the answer tokens, of a student with these final hidden states and this head."""
        ...


class Teacher(Protocol):
    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> Targets:
        """
        Args:
            model: what is trained, wrapped as it is trained. inputs: a batch of it.
            answers_BT: True where the next token is an answer token; the last column never is.
        """
        ...


@dataclass(frozen=True)
class DenseTargets:
    """All of the teacher's distribution, by its final hidden states: logits are made of both models tile by tile and never kept."""

    hidden_AH: Tensor
    lm_head: nn.Linear
    temperature: float
    layers: dict[int, Tensor]

    def divergence(self, hidden_AH: Tensor, lm_head: nn.Linear) -> Tensor:
        per_token_A, _ = ChunkedDivergenceFunction.apply(
            hidden_AH, lm_head.weight, lm_head.bias, self.hidden_AH, self.lm_head.weight, None, FORWARD_KL, self.temperature
        )
        return per_token_A.sum()


@dataclass(frozen=True)
class OwnTeacher:
    """The trained model itself, adapters off and every layer full: with LoRA that is the base, without a second copy of it."""

    adapted: PeftModel
    temperature: float
    layers: tuple[int, ...]

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> DenseTargets:
        hybrid = hybrid_in(self.adapted)
        # Through the wrapped model, so that DeepSpeed gathers the weights and mixed precision is the student's.
        with self.adapted.disable_adapter(), hybrid.full_attention(), evaluating(model):
            return ask(model, hybrid, inputs, answers_BT, self.temperature, self.layers)


@dataclass(frozen=True)
class CopiedTeacher:
    """A frozen copy of the base beside the trained model."""

    base: HybridForCausalLM
    temperature: float
    layers: tuple[int, ...]

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> DenseTargets:
        with self.base.full_attention():
            return ask(self.base, self.base, inputs, answers_BT, self.temperature, self.layers)


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's likeliest tokens, see `TopKDivergence`."""

    indices_AK: Tensor
    log_probs_AK: Tensor
    rest_A: Tensor
    temperature: float
    layers: dict[int, Tensor] = field(default_factory=dict)

    def divergence(self, hidden_AH: Tensor, lm_head: nn.Linear) -> Tensor:
        return TopKDivergence.apply(hidden_AH, lm_head.weight, self.indices_AK, self.log_probs_AK, self.rest_A, self.temperature)


@dataclass(frozen=True)
class StoredTeacher:
    """Log-probabilities that were written before training."""

    stored: StoredTopK

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> TopKTargets:
        found = self.stored.of_batch(inputs)
        device = answers_BT.device
        return TopKTargets(*(part.to(device) for part in found), temperature=self.stored.temperature)


def hybrid_in(student: PeftModel | HybridForCausalLM) -> HybridForCausalLM:
    return student.get_base_model() if isinstance(student, PeftModel) else student


@torch.no_grad()
def ask(
    model: nn.Module,
    hybrid: HybridForCausalLM,
    inputs: dict[str, Any],
    answers_BT: Tensor,
    temperature: float,
    layers: tuple[int, ...],
) -> DenseTargets:
    """Run the teacher; logits are made for one column only."""
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    with recorded(hybrid, answers_BT, layers) as states:
        model(**asked | {"use_cache": False, "logits_to_keep": 1})
    return DenseTargets(states.final_AH, hybrid.lm_head, temperature, states.layers)


@dataclass
class States:
    """Hidden states of one forward pass at the answer tokens: the final ones, and the outputs of some layers."""

    final_AH: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded(hybrid: HybridForCausalLM, answers_BT: Tensor, layers: tuple[int, ...]) -> Iterator[States]:
    """While the block runs, a forward pass leaves its states in what is yielded, with their gradients.

    Layers that gradient checkpointing runs again in the backward pass do so after the block, and are not seen again.
    """
    states = States()

    def keep_final(module: nn.Module, args: Any, output: Any) -> None:
        states.final_AH = output.last_hidden_state[answers_BT]

    def keep_layer(index: int, output: Tensor) -> None:
        states.layers[index] = output[answers_BT]

    hooks = [hybrid.model.register_forward_hook(keep_final)]
    for index in layers:
        layer = hybrid.model.layers[index]
        hooks.append(layer.register_forward_hook(lambda module, args, output, index=index: keep_layer(index, output)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no noise on the embeddings while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
