"""What autograd keeps of a forward pass, in bytes a token: counted through transformers' decoder layers, module by module.

Every term names the tensor that is kept. tests/planning/ holds the sum against what autograd really saves.
"""

from dataclasses import dataclass

from lt_train.planning.shape import Layer, ModelShape

FP32 = 4
"""Bytes. RMSNorm computes in fp32, attention's log-sum-exp is fp32, and so are the optimizer's numbers."""


@dataclass(frozen=True)
class Numbers:
    """Bytes of one element, by what it is for.

    Attributes:
        product: what goes into matrix products and attention.
        residual: the stream between the layers. Under autocast with fp32 weights it is fp32, else as `product`.
        weight: weights as they are held.
        autocast: weights that are not held in the products' dtype are cast for each forward pass.
    """

    product: int
    residual: int
    weight: int
    autocast: bool


def layer_bytes(shape: ModelShape, layer: Layer, numbers: Numbers, *, gathered: bool, dense: bool, length: int) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass.

    Args:
        gathered: documents are gathered from rows that pack or pad them, so attention keeps copies of its own.
        dense: this layer's attention is written out (attention: reference) and keeps its probabilities.
        length: tokens of a row.
    """
    attention_norm = _norm(shape.hidden, numbers, layer.norms_trained) + _inputs(
        layer, ("q_proj", "k_proj", "v_proj"), shape, numbers
    )
    mlp_norm = _norm(shape.hidden, numbers, layer.norms_trained) + _inputs(layer, ("gate_proj", "up_proj"), shape, numbers)
    return attention_norm + _attention(shape, layer, numbers, gathered, dense, length) + mlp_norm + _mlp(shape, layer, numbers)


def checkpoint_bytes(shape: ModelShape, numbers: Numbers) -> int:
    """Bytes a token that a decoder layer keeps under gradient checkpointing: what came in. The rest is computed again."""
    return numbers.residual * shape.hidden


def after_layers_bytes(shape: ModelShape, numbers: Numbers) -> int:
    """Bytes a token of the last RMSNorm, and of its output, from which TRL's fused head makes logits tile by tile."""
    return _norm(shape.hidden, numbers, shape.head_trained) + numbers.residual * shape.hidden


def backward_work_bytes(shape: ModelShape, layer: Layer, numbers: Numbers) -> int:
    """Bytes a token that are live in a layer's backward pass beyond what the forward pass kept.

    The peak lies in the MLP: the gradients of its product, of silu(gate) and of up are there at once. The product itself, if it was
    kept, is gone by then.
    """
    gradients = 2 if layer.linears["down_proj"].keeps_input else 3
    return gradients * numbers.product * shape.mlp + 2 * numbers.residual * shape.hidden


def _norm(width: int, numbers: Numbers, trained: bool) -> int:
    """RMSNorm: its input in fp32, one over its root mean square, and where its weight is trained the normalised input."""
    return FP32 * (width + 1) + (numbers.residual * width if trained else 0)


def _inputs(layer: Layer, names: tuple[str, ...], shape: ModelShape, numbers: Numbers) -> int:
    """What several linear modules have as their common input: kept once, but under autocast each that casts keeps its own."""
    linears = [layer.linears[name] for name in names]
    trained = sum(linear.trained for linear in linears)
    adapters = sum(linear.rank > 0 for linear in linears)
    # Under autocast a frozen module, in bf16, takes it as it is; a trained one casts it, and so does an adapter: both are fp32.
    copies = trained + adapters if numbers.autocast else min(trained + adapters, 1)
    return copies * numbers.product * shape.hidden + sum(linear.rank for linear in linears) * numbers.product


def _attention(shape: ModelShape, layer: Layer, numbers: Numbers, gathered: bool, dense: bool, length: int) -> int:
    """Queries, keys and values after the rotary embedding, the output, and its log-sum-exp: what fused kernels save.

    The output is also the input of o_proj, and the same tensor unless documents were gathered.
    """
    kept = numbers.product * (2 * shape.queries + 2 * shape.keys) + FP32 * shape.heads
    if shape.query_key_norm:
        width = shape.queries + shape.keys
        kept += FP32 * (width + shape.heads + shape.key_heads) + (numbers.product * width if layer.norms_trained else 0)
    if dense:  # softmax in fp32 and its copy for the product; the boolean mask is shared by heads
        kept += shape.heads * length * (FP32 + (numbers.product if numbers.product != FP32 else 0)) + length
    out = layer.linears["o_proj"]
    if out.keeps_input and (gathered or (numbers.autocast and out.rank > 0)):
        kept += numbers.product * shape.queries
    return kept + out.rank * numbers.product


def _mlp(shape: ModelShape, layer: Layer, numbers: Numbers) -> int:
    """gate, silu(gate) and up; their product where down_proj needs it."""
    down = layer.linears["down_proj"]
    return numbers.product * ((4 if down.keeps_input else 3) * shape.mlp + down.rank)
