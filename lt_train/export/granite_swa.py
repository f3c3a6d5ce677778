"""A hybrid with learned sinks as a checkpoint of GraniteSWA, the stock class whose layers have windows and sinks.

GraniteSWA is Granite, which with all multipliers at 1 is Llama, and with biases Qwen2. So transformers and vLLM compute such a
hybrid by their own classes. GraniteSWA has sinks in its full layers as well, which here leave the probabilities as they are.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteConfig, PreTrainedConfig
from transformers.models.granite_swa import GraniteSWAConfig, GraniteSWAForCausalLM

from lt_train.export.weights import ExportedHybrid, WeightFiles, base_files, files_by_name
from lt_train.hybrid.configuration import HybridConfig
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from lt_train.vllm_plugin.checks import fits_granite_swa

NO_SINK = -(2.0**13)
"""A sink logit so far below every score that exp of the difference is 0; it is the same number in bf16 and fp16."""

_SINKS = ".self_attn.sinks"
_OF_THE_CLASS = {"model_type", "architectures", "auto_map", "transformers_version", "layer_rope_theta"}


def is_granite_swa(config: HybridConfig) -> bool:
    return fits_granite_swa(config.model_type, config.spec)


def granite_swa_config(model: HybridForCausalLM) -> GraniteSWAConfig:
    config, layer = model.config, model.model.layers[0]
    known = GraniteSWAConfig().to_dict().keys() - _OF_THE_CLASS
    values = {name: value for name, value in config.to_dict().items() if name in known}
    values["head_dim"], values["attention_multiplier"] = layer.self_attn.head_dim, layer.self_attn.scaling
    values["logits_scaling"] = getattr(config, "hidden_scaling", 1.0)
    values["attention_bias"], values["mlp_bias"] = (x.bias is not None for x in (layer.self_attn.q_proj, layer.mlp.gate_proj))
    return GraniteSWAConfig(**values, architectures=[GraniteSWAForCausalLM.__name__])


class GraniteSWAWeights:
    """The weights of a hybrid by GraniteSWA's names, with those that the hybrid lacks: biases of 0, and NO_SINK in full layers."""

    def __init__(self, hybrid: ExportedHybrid) -> None:
        self._hybrid = hybrid
        self._own = {name.removesuffix(".weight") if _SINKS in name else name: name for name in hybrid.parameters}
        self._added = {name: value for name, value in _added(hybrid.skeleton).items() if name not in self._own}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name; their shapes count."""
        found = self._hybrid.parameters
        return {name: found[own] for name, own in self._own.items()} | self._added

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._added[name].to(dtype) if name in self._added else self._hybrid.weight(self._own[name], dtype)


def _added(skeleton: HybridForCausalLM) -> dict[str, Tensor]:
    config, added = skeleton.config, {}
    for name, layer in skeleton.model.layers.named_children():
        added[f"model.layers.{name}{_SINKS}"] = torch.full((config.num_attention_heads,), NO_SINK)
        if layer.self_attn.q_proj.bias is not None:
            added[f"model.layers.{name}.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    return added


def load_granite_swa(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, **from_pretrained: Any) -> HybridForCausalLM:
    """Load what GraniteSWAWeights wrote, as a hybrid of Granite.

    Raises:
        UserError: a full layer has a sink.
    """
    assert isinstance(config, GraniteSWAConfig) and config.layer_types is not None
    spec = HybridSpec.from_layer_types(config.layer_types, 0, config.sliding_window, learned_sinks=True)
    not_the_bases = _OF_THE_CLASS | {"layer_types", "sliding_window"}
    base = GraniteConfig(**{name: value for name, value in config.to_dict().items() if name not in not_the_bases})
    model = load_hybrid(folder, spec, dtype=dtype, config=base, surplus=_SINKS, **from_pretrained)
    files = WeightFiles(files_by_name(base_files(str(folder), None)))
    for layer in range(spec.num_layers):
        name = f"model.layers.{layer}{_SINKS}"
        sinks_H = files.read(name)
        if spec.is_lazy(layer):
            model.get_parameter(f"{name}.weight").data.copy_(sinks_H)
        elif sinks_H.gt(NO_SINK).any():
            raise UserError(f"{folder}: {name}: full layer {layer} has a sink, which no hybrid has. Fix: export it again")
    return model
