"""Teachers: the base, with full attention in every layer, on the answer tokens of a batch.

A teacher runs before the student's forward pass and returns targets, which compute their divergence from a student's hidden states.

Legend: B rows, T columns, A answer tokens of a batch (positions whose next token has a label), H hidden size, V vocab_size, K kept.
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
    """A teacher's targets for one batch."""

    @property
    def layers(self) -> dict[int, Tensor]:
        """Layer index -> the teacher's output (A, H) of this layer, for the requested layers."""
        ...

    def divergence(self, hidden_AH: Tensor, lm_head: nn.Linear) -> Tensor:
        """KL(teacher || student), summed over the answer tokens, for a student with these final hidden states and this head."""
        ...


class Teacher(Protocol):
    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> Targets:
        """
        Args:
            model: the trained model with its wrappers. inputs: one of its batches.
            answers_BT: True where the next token is an answer token; False in the last column.
        """
        ...


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's full distribution, as its final hidden states: logits of both models are computed by tiles and never stored."""

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
    """The trained model without its adapters and with full attention: with LoRA this is the base, without a second copy of it."""

    adapted: PeftModel
    temperature: float
    layers: tuple[int, ...]

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> DenseTargets:
        hybrid = hybrid_in(self.adapted)
        # By the wrapped model, so that DeepSpeed gathers the weights and mixed precision is the student's.
        with self.adapted.disable_adapter(), hybrid.full_attention(), evaluating(model):
            return run_teacher(model, hybrid, inputs, answers_BT, self.temperature, self.layers)


@dataclass(frozen=True)
class CopiedTeacher:
    """A frozen copy of the base, in memory with the trained model."""

    base: HybridForCausalLM
    temperature: float
    layers: tuple[int, ...]

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> DenseTargets:
        with self.base.full_attention():
            return run_teacher(self.base, self.base, inputs, answers_BT, self.temperature, self.layers)


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's most likely tokens, see `TopKDivergence`."""

    indices_AK: Tensor
    log_probs_AK: Tensor
    rest_A: Tensor
    temperature: float
    layers: dict[int, Tensor] = field(default_factory=dict)

    def divergence(self, hidden_AH: Tensor, lm_head: nn.Linear) -> Tensor:
        return TopKDivergence.apply(hidden_AH, lm_head.weight, self.indices_AK, self.log_probs_AK, self.rest_A, self.temperature)


@dataclass(frozen=True)
class StoredTeacher:
    """Log-probabilities in files, written before training."""

    stored: StoredTopK

    def targets(self, model: nn.Module, inputs: dict[str, Any], answers_BT: Tensor) -> TopKTargets:
        indices_AK, log_probs_AK, rest_A = (tensor.to(answers_BT.device) for tensor in self.stored.of_batch(inputs))
        return TopKTargets(indices_AK, log_probs_AK, rest_A, self.stored.temperature)


def hybrid_in(student: PeftModel | HybridForCausalLM) -> HybridForCausalLM:
    return student.get_base_model() if isinstance(student, PeftModel) else student


@torch.no_grad()
def run_teacher(
    model: nn.Module,
    hybrid: HybridForCausalLM,
    inputs: dict[str, Any],
    answers_BT: Tensor,
    temperature: float,
    layers: tuple[int, ...],
) -> DenseTargets:
    """Run the teacher; logits are computed for one column only."""
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    with recorded(hybrid, answers_BT, layers) as states:
        model(**unlabelled | {"use_cache": False, "logits_to_keep": 1})
    return DenseTargets(states.final_AH, hybrid.lm_head, temperature, states.layers)


@dataclass
class States:
    """Hidden states of one forward pass at the answer tokens: the final ones, and the outputs of some layers."""

    final_AH: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded(hybrid: HybridForCausalLM, answers_BT: Tensor, layers: tuple[int, ...]) -> Iterator[States]:
    """While the block runs, a forward pass stores its states in the yielded object, with their gradients.

    Gradient checkpointing runs layers again in the backward pass, after the block: those runs are not recorded.
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
    """While the block runs, the model has no dropout and no noise on the embeddings."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
