"""The trainable weights of a hybrid: adapters on some modules, the projections of streaming layers, or all."""

import re
from collections.abc import Callable, Iterable, Sequence

from peft import LoraConfig
from torch import nn

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.trained_weights import attention_modules
from lt_train.recipe.schema import Lora
from lt_train.runtime.errors import UserError, shortened

LAYERS = "layers"  # the name of the decoder layers in every hybrid class: model.layers.<i>
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")  # qkv_proj: of families that make all three at once
SINKS = "sinks"  # the module of a layer's learned sinks


def lora_config(lora: Lora, spec: HybridSpec, model: nn.Module) -> LoraConfig:
    """PEFT's configuration: adapters on `lora.targets` of the layers that stream, wholly or in part, or of all layers.

    Raises:
        UserError: a name is not in the model, or no layer streams.
    """
    layers = list(range(spec.num_layers)) if lora.layers == "all" else list(spec.streaming_layers)
    if not layers:
        raise UserError("lora.layers: lazy: no layer of this model streams, so nothing would be trained. Fix: set lora.layers: all")
    check_names(lora, model)
    peft = dict(lora.peft)
    if spec.learned_sinks:
        peft["modules_to_save"] = [*(peft.get("modules_to_save") or ()), SINKS]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        layers_to_transform=layers,
        layers_pattern=LAYERS,
        task_type="CAUSAL_LM",
        **peft,
    )


def freeze_all_but_lazy_projections(model: nn.Module, spec: HybridSpec) -> None:
    """Keep only the attention projections and learned sinks of streaming layers trainable; only they have optimizer states.

    A layer of which some KV heads stream is trained with all its heads: its output projection mixes all heads.

    Raises:
        UserError: no layer streams.
    """
    if not spec.streams:
        raise UserError(
            "train.parameters: lazy_projections: no layer of this model streams, so nothing would be trained. "
            "Fix: set train.parameters: all"
        )
    trained = re.compile(attention_modules(spec.streaming_layers, (*PROJECTIONS, SINKS)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.search(name) is not None)


def check_names(lora: Lora, model: nn.Module) -> None:
    """Refuse names that are not in the model: PEFT raises an error for some, warns about some, and silently ignores the others.

    Args:
        model: of the base's architecture; its weights do not matter.

    Raises:
        UserError: a name in `lora.targets` or in a setting of `lora.peft` is not in the model.
    """
    modules = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{LAYERS}." in name]
    adapted = [name for name in linear if any(_ends_in(target, name) for target in lora.targets)]
    _refuse_unknown("lora.targets", lora.targets, "linear module of a layer", linear, _ends_in)
    peft, tokens = lora.peft, lora.peft.get("trainable_token_indices")
    parameters, is_pattern = [name for name, _ in model.named_parameters()], isinstance(peft.get("exclude_modules"), str)
    excluded = [peft["exclude_modules"]] if is_pattern else peft.get("exclude_modules")
    excludes = re.fullmatch if is_pattern else _ends_in
    for setting, names, what, there, matches in (
        ("modules_to_save", peft.get("modules_to_save"), "module", modules, _ends_in),
        ("trainable_token_indices", tokens if isinstance(tokens, dict) else None, "module", modules, _ends_in),
        ("target_parameters", peft.get("target_parameters"), "parameter", parameters, _ends_in),
        ("rank_pattern", peft.get("rank_pattern"), "module with an adapter", adapted, _matches_end),
        ("alpha_pattern", peft.get("alpha_pattern"), "module with an adapter", adapted, _matches_end),
        ("exclude_modules", excluded, "module with an adapter", adapted, excludes),
    ):
        _refuse_unknown(f"lora.peft.{setting}", names or (), what, there, matches)
    if all(any(excludes(name, module) for name in excluded or ()) for module in adapted):
        raise UserError("lora.peft.exclude_modules: no module of lora.targets is left. Fix: remove it, or name fewer modules")


def _refuse_unknown(
    setting: str, names: Iterable[str], what: str, there: Sequence[str], matches: Callable[[str, str], object]
) -> None:
    """
    Args:
        there: the modules or parameters of the model. matches: whether a name (or a pattern) matches one of them.
    """
    for name in names:
        try:
            known = any(matches(name, other) for other in there)
        except re.error as error:
            raise UserError(f"{setting}: {shortened(name)}: not a regular expression ({error}). Fix: correct it") from error
        if not known:
            last_names = sorted({other.rpartition(".")[2] for other in there if not other[-1].isdecimal()})
            raise UserError(f"{setting}: {shortened(name)}: no {what} has this name. Fix: name some of {', '.join(last_names)}")


def _ends_in(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matches_end(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches a module, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
