"""Weights packed for decoding on a CPU: packed_products.c multiplies a few rows by them, up to twice as fast as torch.

The engine computes with a second model that shares every tensor with the first, except that its larger linear layers hold a packed
copy of their weights: the first model stays as it is, for training, export and whatever reads its weights.

Sums are made in another order, so results differ from those of the stored weights in the last bits (fp32: 1e-6 of the largest).
"""

from copy import deepcopy
from ctypes import CDLL, c_int, c_void_p
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.compiled_c import compiled, shown_as
from lt_train.runtime.devices import dtype_name, free_memory
from lt_train.runtime.huge_pages import huge_zeros
from lt_train.runtime.units import format_bytes

SMALLEST = 2**16
"""Elements of a weight that is packed: a smaller one takes no longer than Python does to call its product."""
MOST_ROWS = 384
"""With more rows than these, as in prefill, torch multiplies as fast by the stored weights."""
FRACTION_OF_FREE_MEMORY = 0.5
"""What of the free memory the packed copies may take."""


class PackedLinear(nn.Module):
    """`linear` without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        block = c_int.in_dll(_library(), "block").value
        weight, bias = linear.weight.detach(), linear.bias
        missing = -len(weight) % block
        by_block = pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, block)).mT
        self.packed = huge_zeros(by_block.shape, weight.dtype, weight.device).copy_(by_block)
        self.packed_bias = pad(weight.new_zeros(len(weight)) if bias is None else bias.detach(), (0, missing))

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self.linear.in_features, self.linear.out_features
        rows = x.numel() // inputs
        if not 0 < rows <= MOST_ROWS:
            return self.linear(x)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
        with shown_as("packed product"):
            held = (x, self.packed, self.packed_bias)
            _library().multiply(*(tensor.data_ptr() for tensor in held), rows, inputs, outputs, y.data_ptr())
        return y


@cache
def _library() -> CDLL:
    library = compiled("packed_products.c")
    library.multiply.argtypes = [c_void_p] * 3 + [c_int] * 3 + [c_void_p]
    return library


def packed_for(model: HybridForCausalLM, rows: int) -> HybridForCausalLM:
    """The model that the engine computes with: one with packed weights, or the model itself where there is an obstacle.

    Args:
        rows: tokens of a forward pass of all sequences that are generated together, at most.
    """
    if obstacle_to_packing(model, rows) is not None:
        return model
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    packed = {id(linear): PackedLinear(linear) for linear in _linears(model)}
    return deepcopy(model, {**shared, **packed})


def obstacle_to_packing(model: HybridForCausalLM, rows: int) -> str | None:
    """Why the engine computes with the weights as they are stored; None where it packs them."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if model.dtype != torch.float32:
        return f"the weights are in {dtype_name(model.dtype)}, and only float32 is packed"
    if rows == 1:
        return "one sequence gains nothing"
    if not _linears(model):
        return "the weights are too small to gain"
    if (obstacle := obstacle_here()) is not None:
        return obstacle
    needed, free = packed_bytes(model), free_memory(model.device)
    if not fits(needed, free):
        return f"packed copies take {format_bytes(needed)}, and {format_bytes(free)} of memory are free"
    return None


@cache
def obstacle_here() -> str | None:
    """Why no weights are packed for this CPU; None where they can be. The first call compiles."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "the CPU has no AVX2"
    try:
        _library()
    except RuntimeError as error:
        return str(error)
    return None


def is_worth_packing(elements: int) -> bool:
    """Whether a weight of this size gains from being packed."""
    return elements >= SMALLEST


def fits(packed: int, free: int) -> bool:
    """Whether copies of `packed` bytes may be made where `free` are free."""
    return packed <= FRACTION_OF_FREE_MEMORY * free


def packed_bytes(model: HybridForCausalLM) -> int:
    """Bytes of the packed copies."""
    return sum(linear.weight.nbytes for linear in _linears(model))


def _linears(model: HybridForCausalLM) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear and is_worth_packing(module.weight.numel())]
