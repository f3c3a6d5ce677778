"""Weights packed for decoding on a CPU: oneDNN's blocked layout multiplies a few rows faster than the stored one.

The engine computes with a second model that shares every tensor with the first, except that its larger linear layers hold a packed
copy of their weights: the first model stays as it is, for training, export and whatever reads its weights.

Sums are made in another order, so results differ from those of the stored weights in the last bits (fp32: 1e-6 of the largest).
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.devices import dtype_name, free_memory
from lt_train.runtime.units import format_bytes

SMALLEST = 2**18
"""Elements of a weight that is packed: a smaller one gains less than a call of oneDNN costs (measured with 2 to 64 rows)."""
FRACTION_OF_FREE_MEMORY = 0.5
"""What of the free memory the packed copies may take."""


class PackedLinear(nn.Module):
    """`linear` without gradients. One row is multiplied by the stored weights: that is a matter of reading them, in any layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return self.linear(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.linear.bias, "none", [], "")


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
    if not can_pack():
        return "torch has no oneDNN for this CPU, or it is switched off"
    if rows == 1:
        return "one sequence gains nothing"
    if not _linears(model):
        return "the weights are too small to gain"
    needed, free = packed_bytes(model), free_memory(model.device)
    if not fits(needed, free):
        return f"packed copies take {format_bytes(needed)}, and {format_bytes(free)} of memory are free"
    return None


def can_pack() -> bool:
    """Whether this build of torch packs weights for this CPU."""
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return on_x86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


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
