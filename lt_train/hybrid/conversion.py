"""The config of a hybrid, made from its base's."""

from transformers import PreTrainedConfig

from .configuration import HybridConfig
from .families import MINISTRAL
from .modeling import Family
from .spec import HybridSpec

# Fields that the new config sets itself, or that describe the base's files rather than its mathematics.
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
    "w_sink",
    "learned_sinks",
    "streaming_kv_heads",
    "hybrid_version",
}


def config_in(family: Family, base_config: PreTrainedConfig, spec: HybridSpec) -> HybridConfig:
    """All that the base's config says, in the family's class, with the layers and sizes of `spec`."""
    carried = {name: value for name, value in base_config.to_dict().items() if name not in _NOT_CARRIED_OVER}
    if family is MINISTRAL:
        known = set(MINISTRAL.config_class().to_dict())
        carried = {name: value for name, value in carried.items() if name in known}
    kv_heads = base_config.num_key_value_heads or base_config.num_attention_heads
    return family.config_class(
        **carried,
        layer_types=spec.layer_types,
        sliding_window=spec.w_recent,
        w_sink=spec.w_sink,
        learned_sinks=spec.learned_sinks,
        streaming_kv_heads=[list(heads) for heads in spec.streaming_heads(kv_heads)] if spec.split_layers else None,
        hybrid_version=spec.version,
    )
