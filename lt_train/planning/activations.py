"""Activation memory: bytes per token that autograd saves in a forward pass, counted over transformers' decoder layers by module.

Every term names the saved tensor. tests/planning/ compares the sum with what autograd saves.
"""

from dataclasses import dataclass, replace

from lt_train.planning.shape import Layer, ModelShape

FP32 = 4
"""Bytes of an element. RMSNorm computes in fp32; attention's log-sum-exp and the optimizer's states are fp32."""


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of one element, by the kind of tensor.

    Attributes:
        product: inputs of matrix products and of attention.
        residual: the residual stream. Under autocast with fp32 weights it is fp32, otherwise as `product`.
        weight: weights as they are stored.
        autocast: weights that are stored in another dtype than that of the products are cast for each forward pass.
    """

    product: int
    residual: int
    weight: int
    autocast: bool


def layer_bytes(shape: ModelShape, layer: Layer, element: ElementBytes, *, gathered: bool, dense: bool, length: int) -> int:
    """Bytes per token that one decoder layer saves for its backward pass.

    Args:
        gathered: documents are gathered from packed or padded rows, so attention saves copies of its own.
        dense: what streams or slides computes attention by the reference kernel (attention: reference), which saves its
            probabilities.
        length: tokens of a row.
    """
    norms = 2 * _norm(shape, element, layer.norms_trained)
    if shape.norms_of_outputs:
        norms += 2 * _norm(shape, replace(element, residual=element.product), layer.norms_trained)
    inputs = _inputs(layer, ("q_proj", "k_proj", "v_proj", "qkv_proj"), shape, element)
    inputs += _inputs(layer, ("gate_proj", "up_proj", "gate_up_proj"), shape, element)
    return norms + inputs + _attention(shape, layer, element, gathered, dense, length) + _mlp(shape, layer, element)


def checkpoint_bytes(shape: ModelShape, element: ElementBytes) -> int:
    """Bytes per token that a decoder layer saves under gradient checkpointing: its input. The rest is recomputed."""
    return element.residual * shape.hidden


def after_layers_bytes(shape: ModelShape, element: ElementBytes) -> int:
    """Bytes per token of the last RMSNorm and of its output, from which TRL's fused head computes logits tile by tile."""
    return _norm(shape, element, shape.head_trained) + element.residual * shape.hidden


def backward_workspace_bytes(shape: ModelShape, layer: Layer, element: ElementBytes) -> int:
    """Bytes per token that a layer's backward pass allocates beyond the saved activations.

    The peak is in the MLP: the gradients of its product, of silu(gate) and of up exist together. The product itself, if it was
    saved, is freed by then.
    """
    gradients = 2 if layer.linears["down_proj"].keeps_input else 3
    return gradients * element.product * shape.mlp + 2 * element.residual * shape.hidden


def _norm(shape: ModelShape, element: ElementBytes, trained: bool) -> int:
    """RMSNorm: its input in fp32, the reciprocal of its root mean square, and the normalised input where its weight is trained."""
    normalised = FP32 if shape.norms_in_fp32 else element.residual
    return FP32 * (shape.hidden + 1) + (normalised * shape.hidden if trained else 0)


def _inputs(layer: Layer, names: tuple[str, ...], shape: ModelShape, element: ElementBytes) -> int:
    """The common input of those of these linear modules that the family has: saved once; under autocast each module that casts it
    saves its own copy."""
    linears = [layer.linears[name] for name in names if name in layer.linears]
    trained = sum(linear.trained for linear in linears)
    adapters = sum(linear.rank > 0 for linear in linears)
    # Under autocast a frozen module, in bf16, takes the input as it is; trained modules and adapters, in fp32, cast it.
    copies = trained + adapters if element.autocast else min(trained + adapters, 1)
    return copies * element.product * shape.hidden + sum(linear.rank for linear in linears) * element.product


def _attention(shape: ModelShape, layer: Layer, element: ElementBytes, gathered: bool, dense: bool, length: int) -> int:
    """Queries, keys and values after the rotary embedding, the output, and its log-sum-exp, as fused kernels save them.

    The output is also the input of o_proj: the same tensor unless documents were gathered, the layer is split, or the family copies
    it. A split layer attends to copies of queries, keys and values, and what they are copied from is freed.
    """
    saved = element.product * (2 * shape.queries + 2 * shape.keys) + FP32 * shape.heads
    if shape.query_key_norms:
        width = shape.queries + shape.keys
        normalised = FP32 if shape.norms_in_fp32 else element.product
        saved += FP32 * (width + shape.query_key_norms) + (normalised * width if layer.norms_trained else 0)
    if shape.fused_qkv and not gathered and not layer.is_split:
        saved += element.product * (shape.queries + shape.keys)
    if dense:  # softmax in fp32 and its copy for the product; the boolean mask is shared by heads
        probabilities = FP32 + (element.product if element.product != FP32 else 0)
        saved += round((1 if layer.slides else layer.streaming) * shape.heads) * length * probabilities + length
    out = layer.linears["o_proj"]
    if out.keeps_input and (gathered or layer.is_split or shape.copies_output or (element.autocast and out.rank > 0)):
        saved += element.product * shape.queries
    return saved + out.rank * element.product


def _mlp(shape: ModelShape, layer: Layer, element: ElementBytes) -> int:
    """gate, silu(gate) and up, and their product where down_proj needs it; of experts also what goes in and comes out of each, and
    the router's probabilities. Autocast leaves the products of experts in the dtype of their weights."""
    down = layer.linears["down_proj"]
    kept = ((4 if down.keeps_input else 3) + 3 * shape.clamps_gates) * shape.mlp + down.rank
    kept += (2 if down.keeps_input else 1) * shape.experts_of_token * shape.hidden
    return (element.weight if shape.experts else element.product) * kept + FP32 * (shape.experts + shape.experts_of_token)
