"""Does a saved model hold every weight at its full shape? Under ZeRO-3 a save can come out empty, without an error."""

import json
import struct
from collections import Counter
from pathlib import Path

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lt_train.errors import UserError

Shapes = Counter[tuple[int, ...]]  # how many weights of each shape; names change on saving (PEFT, tied weights), shapes do not


def full_shapes(model: nn.Module, *, trainable_only: bool) -> Shapes:
    """The shapes that a save of `model` must hold (`trainable_only`: a save of its adapter). Tied weights count once."""
    zero3 = is_deepspeed_zero3_enabled()  # then a parameter is an empty shell, and ds_shape says what it stands for
    return Counter(tuple(p.ds_shape if zero3 else p.shape) for p in model.parameters() if p.requires_grad or not trainable_only)


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
            f"(missing: {_some(missing)}; empty in the file: {', '.join(empty[:3]) or 'none'}). Under DeepSpeed ZeRO-3 the file "
            "named by train.deepspeed needs zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
        )


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the JSON header: 8 bytes of its length, little-endian, then the header (safetensors format)."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _some(shapes: Shapes) -> str:
    return ", ".join(f"{count} x {list(shape)}" for shape, count in list(shapes.items())[:3])
