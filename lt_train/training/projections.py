"""Which weights of a hybrid's layers training may change, and which it gives back: protection for what the base recalls.

The attention of a layer is its q, k, v and o projections (weights and, where a base has them, biases). Its queries and keys are
made by q and k, and in Qwen3 by q_norm and k_norm as well.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_KEY = ("q_proj", "k_proj", "q_norm", "k_norm")


def freeze_all_but_lazy_projections(model: nn.Module, spec: HybridSpec) -> None:
    """Of a hybrid's parameters only the projections of its streaming layers stay trainable, and get optimizer states.

    Raises:
        UserError: no layer streams.
    """
    if not spec.lazy_layers:
        raise UserError(
            "train.parameters: lazy_projections: no layer of this model streams, so nothing would be trained. Set it to all"
        )
    trained = re.compile(_in_layers(spec.lazy_layers, PROJECTIONS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.search(name) is not None)


def load_with_query_key_of_base(
    folder: Path, load_base: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype
) -> PreTrainedModel:
    """What full fine-tuning left in `folder`, with queries and keys of the full-attention layers made as the base makes them
    (QK-Restore, arXiv 2606.11052).

    The base is loaded and all other weights are laid over it, a tensor at a time, so there is never a second model in memory.

    Raises:
        UserError: `folder` lacks weights or holds others.
    """
    model = load_base(dtype)
    parameters = dict(model.named_parameters())  # tied weights once
    restored = re.compile(_in_layers(_full_layers(model.config.spec), QUERY_KEY))
    missing = {name for name in parameters if not restored.search(name)}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            for name in opened.keys():  # noqa: SIM118  a file, no dict
                if name not in parameters:
                    raise UserError(f"{file}: holds {name}, which this model lacks. Train again into another run folder")
                if name in missing:
                    parameters[name].copy_(opened.get_tensor(name))
                    missing.remove(name)
    if missing:
        raise UserError(
            f"{folder}: lacks {len(missing)} weights, such as {min(missing)}. Delete it and run again to publish it anew"
        )
    return model.eval()


def adapter_without_query_key(folder: Path, spec: HybridSpec) -> PeftConfig:
    """The configuration of the adapter in `folder`, less the adapters of queries and keys in full-attention layers."""
    config = PeftConfig.from_pretrained(folder)
    config.exclude_modules = rf".*{_in_layers(_full_layers(spec), ('q_proj', 'k_proj'))}"
    config.inference_mode = True
    return config


def _full_layers(spec: HybridSpec) -> list[int]:
    return [layer for layer in range(spec.num_layers) if not spec.is_lazy(layer)]


def _in_layers(layers: list[int] | tuple[int, ...], modules: tuple[str, ...]) -> str:
    """A pattern of the names of these modules in these decoder layers."""
    return rf"\blayers\.({'|'.join(map(str, layers))})\.self_attn\.({'|'.join(modules)})\b"
