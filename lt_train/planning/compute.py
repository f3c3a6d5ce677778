"""Floating-point operations of a training, and the hours they take. A multiply-add counts as two.

A linear module takes 2 x weights for each token in the forward pass, as much for the gradient of its input, and as much for that of
its weights (Kaplan et al., arXiv 2001.08361, section 2.1). Attention takes 4 x queries' width for each query and key that it sees,
and twice that in the backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape
from lt_train.planning.work import Work
from lt_train.recipe.schema import Train

MULTIPLY_ADD = 2
TERA, HOUR = 10**12, 3600


@dataclass(frozen=True)
class Compute:
    """Operations of the whole training.

    Attributes:
        linear: layers' linear modules, adapters, head. attention: scores and their products with values.
        full_attention: what `attention` would be if no layer streamed.
    """

    linear: float
    attention: float
    full_attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def hours(self, machine: Machine) -> float:
        return self.total / (machine.gpus * machine.tflops * TERA * machine.efficiency) / HOUR


def training_compute(shape: ModelShape, train: Train, work: Work) -> Compute:
    again = 1 if train.gradient_checkpointing else 0  # the forward pass of all layers
    linears = [linear for layer in shape.layers for linear in layer.linears.values()]
    weights = sum(linear.weights for linear in linears)
    trained = sum(linear.weights for linear in linears if linear.trained)
    per_token = weights * (2 + again) + trained  # forward and gradients of inputs; gradients of weights
    per_token += shape.adapters * (3 + again)
    per_token += shape.head * (3 + (1 if shape.head_trained else 0))  # TRL's head makes each tile of logits twice
    attention = (3 + again) * work.rounds
    seen, seen_if_full = _seen(shape, work.samples.lengths)
    taught = 1 if train.distill.weight > 0 and train.distill.teacher != "top_k" else 0  # one more forward pass, every layer full
    per_token += taught * (weights + shape.head)
    by_key = 2 * MULTIPLY_ADD * shape.queries
    teacher = taught * work.rounds * seen_if_full
    return Compute(
        linear=MULTIPLY_ADD * per_token * work.tokens,
        attention=by_key * (attention * seen + teacher),
        full_attention=by_key * (attention * seen_if_full + teacher),
    )


def _seen(shape: ModelShape, lengths: Iterable[int]) -> tuple[int, int]:
    """Pairs of a query and a key that it sees, in all layers and samples; and if no layer streamed."""
    full = streaming = 0
    for length in lengths:
        full += causal_pairs(length)
        streaming += streaming_pairs(length, shape.spec.window)
    streams = sum(layer.streams for layer in shape.layers)
    return (len(shape.layers) - streams) * full + streams * streaming, len(shape.layers) * full


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def streaming_pairs(length: int, window: int) -> int:
    """As causal attention for the first `window` (sinks and recent keys) queries, then `window` keys each."""
    return causal_pairs(min(length, window)) + max(length - window, 0) * window
