"""From a base model to a hybrid: a config is written, weights are not. The base's shards load straight into the hybrid class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .configuration import (
    HybridConfig,
    HybridMinistralConfig,
    HybridQwen2Config,
    HybridQwen3Config,
    is_hybrid,
)
from .modeling import (
    HybridForCausalLM,
    HybridMinistralForCausalLM,
    HybridQwen2ForCausalLM,
    HybridQwen3ForCausalLM,
)
from .spec import STREAMING, HybridError, HybridSpec


@dataclass(frozen=True)
class Family:
    """The classes that a base architecture becomes."""

    config_class: type[HybridConfig]
    model_class: type[HybridForCausalLM]


QWEN2 = Family(HybridQwen2Config, HybridQwen2ForCausalLM)
QWEN3 = Family(HybridQwen3Config, HybridQwen3ForCausalLM)
MINISTRAL = Family(HybridMinistralConfig, HybridMinistralForCausalLM)

FAMILIES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": MINISTRAL,
    "mistral": MINISTRAL,
    "ministral": MINISTRAL,
    HybridQwen2Config.model_type: QWEN2,
    HybridQwen3Config.model_type: QWEN3,
    HybridMinistralConfig.model_type: MINISTRAL,
}

# So that AutoConfig and AutoModelForCausalLM find the classes in a process that has lt_train.
for _family in (QWEN2, QWEN3, MINISTRAL):
    AutoConfig.register(_family.config_class.model_type, _family.config_class)
    AutoModelForCausalLM.register(_family.config_class, _family.model_class)

# What the new config says itself, or what describes the base's files rather than its mathematics.
_NOT_CARRIED_OVER = {
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "use_cache",
    "output_attentions",
}


def hybrid_config(base_config: PreTrainedConfig, spec: HybridSpec) -> HybridConfig:
    """The base's config as that of a hybrid.

    Raises:
        HybridError: an architecture that has no hybrid class, a base with a window of its own, with biases that `ministral`
            lacks, or with quantized weights; a spec for another number of layers.
    """
    family = family_of(base_config)
    _refuse_what_the_hybrid_class_lacks(base_config, family)
    if spec.num_layers != base_config.num_hidden_layers:
        raise HybridError(f"the spec is for {spec.num_layers} layers, the base has {base_config.num_hidden_layers}")
    carried = {name: value for name, value in base_config.to_dict().items() if name not in _NOT_CARRIED_OVER}
    if family is MINISTRAL:
        known = set(MINISTRAL.config_class().to_dict())
        carried = {name: value for name, value in carried.items() if name in known}
    return family.config_class(**carried, layer_types=spec.layer_types, sliding_window=spec.w_recent, w_sink=spec.w_sink)


def family_of(config: PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(name for name in FAMILIES if not name.startswith("lt_hybrid")))
        raise HybridError(f"model_type {config.model_type!r}: no hybrid class for it; there are classes for {known}")
    return FAMILIES[config.model_type]


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
    **from_pretrained: Any,
) -> HybridForCausalLM:
    """Load a base model's weights into the hybrid class, without a second copy in memory or on disk.

    Args:
        base: folder or hub id of the base model. spec: an empty `lazy_layers` gives the base itself.
        config: the base's, where it is to be another than that in its folder.
        from_pretrained: passed on, for example `device_map`.

    Raises:
        HybridError: see `hybrid_config`; weights that are missing, left over or of other shapes.
    """
    base_config = AutoConfig.from_pretrained(base, revision=revision) if config is None else config
    model = _load(base, hybrid_config(base_config, spec), dtype=dtype, revision=revision, **from_pretrained)
    model.set_attention_kernel(attention_kernel)
    return model


def load_hybrid_checkpoint(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attention_kernel: str = "auto", **from_pretrained: Any
) -> HybridForCausalLM:
    """Load what a hybrid's `save_pretrained` wrote.

    Raises:
        HybridError: the folder holds no hybrid, or its weights do not fit its config.
    """
    config = AutoConfig.from_pretrained(folder)
    if not is_hybrid(config):
        raise HybridError(f"{folder}: model_type {config.model_type!r} is no hybrid. Use load_hybrid for a base model")
    model = _load(folder, config, dtype=dtype, **from_pretrained)
    model.set_attention_kernel(attention_kernel)
    return model


def _load(source: str | Path, config: HybridConfig, **from_pretrained: Any) -> HybridForCausalLM:
    model, info = family_of(config).model_class.from_pretrained(
        source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained
    )  # mismatched sizes are refused below, in words that name them
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:4])}" for kind, names in wrong.items())
        raise HybridError(f"{source}: its weights do not fit a {config.model_type} model ({found})")
    return model.eval()


def _refuse_what_the_hybrid_class_lacks(config: PreTrainedConfig, family: Family) -> None:
    values = config.to_dict()
    if not is_hybrid(config) and _slides(config, values):
        raise HybridError(
            "the base slides already: its config sets a sliding window, and a hybrid starts from full attention in every layer. "
            "Fix: name a base without a window, or the model that this hybrid was made from; if no sequence is longer than "
            "the window, set sliding_window to null (of Qwen, use_sliding_window to false) in a copy of its config.json"
        )
    if family is MINISTRAL:
        biases = [name for name in ("attention_bias", "mlp_bias") if values.get(name)]
        if biases:
            raise HybridError(
                f"the base has {' and '.join(biases)}: Llama and Mistral models become `ministral`, which has no such biases"
            )
    if values.get("quantization_config"):
        raise HybridError("the base's weights are quantized: start from its bf16 or fp32 weights")


def _slides(config: PreTrainedConfig, values: dict[str, Any]) -> bool:
    layer_types = values.get("layer_types")
    if layer_types is not None:
        return STREAMING in layer_types
    return config.model_type == "mistral" and values.get("sliding_window") is not None
