"""Checks that a saved model holds every weight at its full shape: under ZeRO-3 a save can be empty, without an error."""

import json
import math
import struct
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lt_train.runtime.errors import UserError

Shapes = Counter[tuple[int, ...]]  # the number of weights of each shape; saving changes names (PEFT, tied weights), not shapes


def full_shapes(model: nn.Module, *, trainable_only: bool) -> Shapes:
    """The shapes that a save of `model` must hold (`trainable_only`: a save of its adapter). Tied weights count once.

    A save of the model has each expert's weights apart, as the checkpoints of its family have them.
    """
    # Under ZeRO-3 a parameter is empty, and ds_shape is its full shape; adapters are partitioned only when training starts.
    shapes = {
        name: tuple(p.ds_shape if hasattr(p, "ds_shape") else p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad or not trainable_only
    }
    if trainable_only or not isinstance(model, PreTrainedModel):
        return Counter(shapes.values())
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return Counter(tuple(weight.shape) for weight in revert_weight_conversion(model, weights).values())


def full_size(model: nn.Module, *, trainable_only: bool) -> int:
    """The number of parameters, also where ZeRO-3 partitions them."""
    return sum(math.prod(shape) * count for shape, count in full_shapes(model, trainable_only=trainable_only).items())


def check_saved_shapes(folder: Path, expected: Shapes) -> None:
    """Compare the safetensors headers in `folder` with `expected`; no weight is read.

    Raises:
        UserError: weights are missing, empty or of another shape.
    """
    saved = {name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _header(file).items()}
    missing = expected - Counter(saved.values())
    if missing:
        empty = [name for name, shape in saved.items() if 0 in shape]
        raise UserError(
            f"{folder}: {missing.total()} of {expected.total()} weights were not saved at their full shape "
            f"(missing: {_some(missing)}; empty in the file: {', '.join(empty[:3]) or 'none'}). Fix: under DeepSpeed ZeRO-3, set "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: true in the file of train.deepspeed"
        )


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the JSON header. The safetensors format starts with its length, 8 bytes, little-endian."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}


def _some(shapes: Shapes) -> str:
    return ", ".join(f"{count} x {list(shape)}" for shape, count in list(shapes.items())[:3])
