"""Floating-point operations of a training, and the hours they take. A multiply-add counts as two.

A linear module takes 2 x weights per token in the forward pass, as many for the gradient of its input, and as many for the gradient
of its weights (Kaplan et al., arXiv 2001.08361, section 2.1). Attention takes 4 x the width of all query heads for each pair of a
query and a key that it sees, and twice that in the backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape
from lt_train.planning.workload import Workload
from lt_train.recipe.schema import Train

MULTIPLY_ADD = 2
TERA, HOUR = 10**12, 3600


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of all of the training.

    Attributes:
        linear: linear modules of the layers, adapters, head. attention: scores and their products with values.
        full_attention: `attention` of a model without streaming layers.
    """

    linear: float
    attention: float
    full_attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def hours(self, machine: Machine) -> float:
        return self.total / (machine.gpus * machine.tflops * TERA * machine.efficiency) / HOUR


def training_compute(shape: ModelShape, train: Train, work: Workload) -> Compute:
    recomputed = 1 if train.gradient_checkpointing else 0  # forward passes of all layers
    linears = [linear for layer in shape.layers for linear in layer.linears.values()]
    weights = shape.used_linears
    trained = sum(int(linear.weights * linear.used) for linear in linears if linear.trained)
    per_token = weights * (2 + recomputed) + trained  # forward and gradients of inputs; gradients of weights
    per_token += shape.adapters * (3 + recomputed)
    per_token += shape.head * (3 + (1 if shape.head_trained else 0))  # TRL's head computes each tile of logits twice
    attention = (3 + recomputed) * work.epochs
    seen, seen_if_full = _seen(shape, work.samples.lengths)
    teacher_passes = 1 if train.distill.weight > 0 and train.distill.teacher != "top_k" else 0  # without streaming
    per_token += teacher_passes * (weights + shape.head)
    by_key = 2 * MULTIPLY_ADD * shape.queries
    teacher = teacher_passes * work.epochs * seen_if_full
    return Compute(
        linear=MULTIPLY_ADD * per_token * work.tokens,
        attention=by_key * (attention * seen + teacher),
        full_attention=by_key * (attention * seen_if_full + teacher),
    )


def _seen(shape: ModelShape, lengths: Iterable[int]) -> tuple[float, int]:
    """Pairs of a query and a visible key, over all layers and samples: of the hybrid, and without streaming layers. A split layer
    has those of its kinds of KV heads, by their fractions."""
    full = streaming = sliding = 0
    for length in lengths:
        sliding += sum(streaming_pairs(length, shape.spec.sliding_window) for _ in shape.spec.sliding_layers)
        full += causal_pairs(length)
        streaming += streaming_pairs(length, shape.spec.window)
    streams = sum(layer.streaming for layer in shape.layers)
    can_stream = len(shape.spec.full_in_base)
    return (can_stream - streams) * full + streams * streaming + sliding, can_stream * full + sliding


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def streaming_pairs(length: int, window: int) -> int:
    """Causal attention for the first `window` (sinks and recent keys) queries, then `window` keys for each query."""
    return causal_pairs(min(length, window)) + max(length - window, 0) * window
