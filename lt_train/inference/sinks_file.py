"""The logits of learned sinks as a file of their own: all that an untrained hybrid has besides the base's weights."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lt_train.hybrid.learned_sinks import LearnedSinks
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import replacing


def learned_sinks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The logits [H] of every layer that has learned sinks, also inside PEFT's wrappers, by name."""
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, LearnedSinks)}


def write_sinks(model: HybridForCausalLM, file: Path) -> None:
    with replacing(file) as unfinished:
        save_file({name: logits_H.detach().float().cpu() for name, logits_H in learned_sinks(model).items()}, unfinished)


def read_sinks(model: HybridForCausalLM, file: Path) -> None:
    """
    Raises:
        UserError: the file cannot be read, or is of another hybrid.
    """
    sinks = learned_sinks(model)
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: learned sinks cannot be read: {error}. Fix: delete this file, and run again") from error
    shapes = {name: getattr(logits_H, "ds_shape", logits_H.shape) for name, logits_H in sinks.items()}  # ZeRO-3 partitions them
    if {name: logits_H.shape for name, logits_H in found.items()} != shapes:
        raise UserError(f"{file}: the learned sinks are of another hybrid. Fix: delete this file, and run again")
    gathered: AbstractContextManager[Any] = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(sinks.values()), modifier_rank=0)
    with gathered, torch.no_grad():
        for name, logits_H in sinks.items():
            logits_H.copy_(found[name])
