"""Loading a base model as a hybrid: only the config changes; the base's weights load directly into the hybrid class.

`hybrid_of` does so with a model that is in memory already.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .auto_family import PREFIX, auto_family
from .base_spec import base_spec
from .configuration import HybridConfig, is_hybrid
from .conversion import config_in
from .families import BASES, FAMILIES, MINISTRAL
from .family_proof import prove_family
from .modeling import Family, HybridForCausalLM
from .spec import HybridError, HybridSpec
from .unsupported_bases import faults_of_rotary_embeddings, faults_of_windows, refuse_unsupported

_MADE: dict[str, Family] = {}
"""Families that `prove_auto_family` or a checkpoint added in this process, by the `model_type` of a base or of a hybrid."""


def _register(family: Family) -> None:
    """AutoConfig and AutoModelForCausalLM find the classes in a process that imports lt_train."""
    AutoConfig.register(family.config_class.model_type, family.config_class)
    AutoModelForCausalLM.register(family.config_class, family.model_class)


for _family in set(FAMILIES.values()):
    _register(_family)
    AutoModel.register(_family.config_class, _family.model_class.body_class)


def hybrid_config(base_config: PreTrainedConfig, spec: HybridSpec) -> HybridConfig:
    """The hybrid's config, made from the base's.

    Raises:
        HybridError: an architecture without a hybrid class; a base with a sliding window in every layer, with biases that
            `ministral` lacks, or with quantized weights; a spec for another number of layers, or for other sliding layers.
    """
    family = family_of(base_config)
    _refuse_unsupported_base(base_config)
    if not is_declared(base_config) and not is_hybrid(base_config):
        _check_undeclared(base_config, spec)  # the family was proved with the settings of another base
    _check_sliding_layers(base_config, spec)
    if spec.num_layers != base_config.num_hidden_layers:
        raise HybridError(
            f"num_layers: {spec.num_layers}: the base has {base_config.num_hidden_layers} layers. Fix: make a spec for this base"
        )
    return config_in(family, base_config, spec)


def _check_sliding_layers(base_config: PreTrainedConfig, spec: HybridSpec) -> None:
    base = base_spec(base_config.to_dict())
    if (spec.sliding_layers, spec.sliding_window) != (base.sliding_layers, base.sliding_window):
        raise HybridError(
            f"sliding_layers: {list(spec.sliding_layers)} with a window of {spec.sliding_window}: in the base layers "
            f"{list(base.sliding_layers)} see {base.sliding_window:,} tokens from the start. Fix: make the spec from "
            "base_spec(config)"
        )


def family_of(config: PreTrainedConfig) -> Family:
    """
    Raises:
        HybridError: an architecture without a hybrid class.
    """
    if config.model_type in _MADE:
        return _MADE[config.model_type]
    refuse_undeclared(config)
    return FAMILIES[config.model_type]


def refuse_undeclared(config: PreTrainedConfig) -> None:
    """
    Raises:
        HybridError: families.py has no family of this base. The message has whether `model.family: auto` could make one.
    """
    if is_declared(config):
        return
    begin, known = f"model_type: {config.model_type!r}: no hybrid class", f"choose a base of one of {', '.join(sorted(BASES))}"
    try:
        refuse_unsupported(config)
    except HybridError as error:
        raise HybridError(f"{begin}: {str(error).partition('. Fix: ')[0]}. Fix: {known}") from error
    raise HybridError(f"{begin}. Fix: set model.family to auto, which makes one and proves it, or {known}")


def is_declared(config: PreTrainedConfig) -> bool:
    """Whether families.py has the family of this base."""
    return config.model_type in FAMILIES


def prove_auto_family(config: PreTrainedConfig) -> None:
    """Make the family of a base from its own classes, and prove it. Afterwards its models load like any others.

    Raises:
        HybridError: a base that cannot become a hybrid, or what differed.
    """
    _check_undeclared(config, None)
    _add(auto_family(config.model_type))


def _check_undeclared(config: PreTrainedConfig, spec: HybridSpec | None) -> None:
    refuse_unsupported(config)
    _refuse_unsupported_base(config)  # quantized weights
    prove_family(config)
    if spec is not None and spec.split_layers:
        prove_family(config, split_layers=True)


def _add(family: Family) -> None:
    model_type = family.config_class.model_type
    if model_type not in _MADE:
        _register(family)
        _MADE[model_type] = _MADE[model_type.removeprefix(PREFIX)] = family


def read_config(source: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint. A hybrid's may name a family that was proved when it was made.

    Raises:
        OSError: none there.
    """
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type", "")
    if model_type.startswith(PREFIX) and model_type not in FAMILIES:
        _add(auto_family(model_type.removeprefix(PREFIX)))
    return AutoConfig.from_pretrained(source)


def build_hybrid(base_config: PreTrainedConfig, spec: HybridSpec) -> HybridForCausalLM:
    """A hybrid with random weights."""
    config = hybrid_config(base_config, spec)
    return family_of(config).model_class(config)


def load_hybrid(
    base: str | Path,
    spec: HybridSpec,
    *,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    attention_kernel: str = "auto",
    surplus: str | None = None,
    **from_pretrained: Any,
) -> HybridForCausalLM:
    """Load a base model's weights into the hybrid class, without a second copy in memory or on disk.

    Args:
        base: folder or hub id of the base model.
        spec: one in which nothing streams gives the base itself. A base has no learned sinks: they are 0.
        config: the base's config, to override the one in its folder.
        surplus: how the names of weights end that the base has, and the hybrid has not.
        from_pretrained: arguments of transformers' `from_pretrained`, for example `device_map`.

    Raises:
        HybridError: see `hybrid_config`; weights that are missing, unexpected or of other shapes.
    """
    base_config = AutoConfig.from_pretrained(base, revision=revision) if config is None else config
    config = hybrid_config(base_config, spec)
    model = _load(base, config, new=_LEARNED_SINKS, surplus=surplus, dtype=dtype, revision=revision, **from_pretrained)
    model.set_attention_kernel(attention_kernel)
    return model


def load_hybrid_checkpoint(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attention_kernel: str = "auto", **from_pretrained: Any
) -> HybridForCausalLM:
    """Load what a hybrid's `save_pretrained` wrote.

    Raises:
        HybridError: the folder holds no hybrid, or its weights do not fit its config.
    """
    config = read_config(folder)
    if not is_hybrid(config):
        raise HybridError(f"{folder}: model_type {config.model_type!r}: not a hybrid. Fix: load a base model with load_hybrid")
    model = _load(folder, config, dtype=dtype, **from_pretrained)
    model.set_attention_kernel(attention_kernel)
    return model


def hybrid_of(model: PreTrainedModel, spec: HybridSpec) -> HybridForCausalLM:
    """A hybrid on the weights of a model in memory: no weight is copied, so training either model changes both.

    Its parameters are objects of their own on the same storage: freezing the hybrid, or moving it to another device, leaves the
    model as it is. Learned sinks that the model lacks are 0.

    Raises:
        HybridError: see `hybrid_config`; a model whose weights are not those of its config (it has adapters), or that is on
            several devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise HybridError("device_map: the model is on several devices. Fix: pass its folder or hub id instead, or use one device")
    config = hybrid_config(model.config, spec)
    config.name_or_path = model.config.name_or_path
    with torch.device("meta"):
        hybrid = family_of(config).model_class(config)
    own = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in model.parameters()}  # tied ones once
    weights = {name: own[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
    for name, weight in hybrid.named_parameters():
        if name.endswith(_LEARNED_SINKS) and name not in weights:
            weights[name] = nn.Parameter(torch.zeros(weight.shape, dtype=model.dtype, device=model.device))
    expected = dict(hybrid.named_parameters(remove_duplicate=False))
    _check_weights(
        type(model).__name__,
        config,
        {
            "missing_keys": expected.keys() - weights.keys(),
            "unexpected_keys": weights.keys() - expected.keys(),
            "mismatched_keys": [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape],
        },
        fix="pass the model as transformers loads it, without adapters or changed modules",
    )
    for name, weight in hybrid.named_parameters():  # `assign` keeps the flag of the weight that is replaced
        weight.requires_grad_(weights[name].requires_grad)
    for name, buffer in model.named_buffers():  # such as a router's correction
        place, _, last = name.rpartition(".")
        setattr(hybrid.get_submodule(place), last, buffer)
    hybrid.load_state_dict(weights | {name: x for name, x in model.state_dict().items() if name not in weights}, assign=True)
    hybrid.model.rotary_emb = type(hybrid.model.rotary_emb)(config).to(model.device)
    hybrid.generation_config = deepcopy(model.generation_config)
    return hybrid.train(model.training)


_LEARNED_SINKS = ".self_attn.sinks.weight"


def _load(
    source: str | Path, config: HybridConfig, *, new: str | None = None, surplus: str | None = None, **from_pretrained: Any
) -> HybridForCausalLM:
    """
    Args:
        new: how the names of weights end that are not in the source. surplus: of those that only the source has.
    """
    with _without_report():
        model, info = family_of(config).model_class.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained
        )  # mismatched sizes raise an error below, which names them
    for kind, ending in (("missing_keys", new), ("unexpected_keys", surplus)):
        if ending is not None:
            info[kind] = {name for name in info[kind] if not name.endswith(ending)}
    _check_weights(str(source), config, info, fix="restore the config.json or the weights of this folder")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise HybridError(
            f"{source}: beside the model there is an adapter (adapter_config.json), which transformers adds to its weights. "
            "Fix: download it, and remove the adapter's files"
        )
    if config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise HybridError(
            f"{source}: tie_word_embeddings: its config.json sets it, and the weights hold an lm_head that differs from the "
            "embeddings: transformers leaves them apart, vLLM would tie them. "
            "Fix: set tie_word_embeddings to false in a copy of its config.json"
        )
    return model.eval()


def _check_weights(source: str, config: HybridConfig, info: Mapping[str, Any], *, fix: str) -> None:
    """Raises HybridError if `info` lists weights that are missing, unexpected, or of other shapes."""
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if faults:
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:4])}" for kind, names in faults.items())
        raise HybridError(f"{source}: its weights do not match a {config.model_type} model ({found}). Fix: {fix}")


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' table of missing weights: these are raised as an error, and new sinks are expected."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_unsupported_base(config: PreTrainedConfig) -> None:
    values, family = config.to_dict(), FAMILIES.get(config.model_type)
    if not is_hybrid(config):
        for fault in faults_of_windows(config):
            raise HybridError(fault)
    if family is MINISTRAL:
        biases = [name for name in ("attention_bias", "mlp_bias") if values.get(name)]
        if biases:
            raise HybridError(
                f"{' and '.join(biases)}: Llama and Mistral models become `ministral`, which has no such biases. "
                "Fix: choose a base without them"
            )
    for fault in faults_of_rotary_embeddings(config):
        raise HybridError(fault)
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method")
        fix = "start from its bf16 or fp32 weights"
        if method == "mxfp4":  # as gpt-oss is published
            fix += (
                ": transformers writes them (from_pretrained with quantization_config=Mxfp4Config(dequantize=True), then "
                "save_pretrained), and model.base names that folder"
            )
        raise HybridError(f"quantization_config: the base's weights are quantized ({method}). Fix: {fix}")
