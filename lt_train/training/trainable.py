"""Which weights of a hybrid training changes: adapters on some modules, the projections of streaming layers, or all."""

import re

from peft import LoraConfig
from torch import nn

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.trained_weights import attention_modules
from lt_train.recipe.schema import Lora
from lt_train.runtime.errors import UserError

LAYERS = "layers"  # the decoder layers of every hybrid class: model.layers.<i>
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora_config(lora: Lora, spec: HybridSpec, model: nn.Module) -> LoraConfig:
    """PEFT's configuration: adapters on `lora.targets` of the lazy layers, or of all.

    Raises:
        UserError: a target that no such layer has, or no lazy layer to train.
    """
    layers = list(range(spec.num_layers)) if lora.layers == "all" else list(spec.lazy_layers)
    if not layers:
        raise UserError("lora.layers: lazy: no layer of this model streams, so nothing would be trained. Fix: set lora.layers: all")
    _check_targets(lora.targets, model)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        layers_to_transform=layers,
        layers_pattern=LAYERS,
        task_type="CAUSAL_LM",
        **lora.peft,
    )


def freeze_all_but_lazy_projections(model: nn.Module, spec: HybridSpec) -> None:
    """Keep only the attention projections of streaming layers trainable; only they get optimizer states.

    Raises:
        UserError: no layer streams.
    """
    if not spec.lazy_layers:
        raise UserError(
            "train.parameters: lazy_projections: no layer of this model streams, so nothing would be trained. "
            "Fix: set train.parameters: all"
        )
    trained = re.compile(attention_modules(spec.lazy_layers, PROJECTIONS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.search(name) is not None)


def _check_targets(targets: list[str], model: nn.Module) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{LAYERS}." in name]
    available = sorted({name.rsplit(".", 1)[-1] for name in linear})
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        raise UserError(
            f"lora.targets: {', '.join(unknown)}: no linear module of a layer has this name. "
            f"Fix: take some of {', '.join(available)}"
        )
