"""The config of a hybrid, made from its base's."""

from transformers import PreTrainedConfig

from .configuration import HybridConfig
from .families import MINISTRAL
from .kv_size import kv_heads
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
    "w_recent",
    "hybrid_version",
}


def config_in(family: Family, base_config: PreTrainedConfig, spec: HybridSpec) -> HybridConfig:
    """All settings of the base's config, in the family's class, with the layers and sizes of `spec`."""
    carried = {name: value for name, value in base_config.to_dict().items() if name not in _NOT_CARRIED_OVER}
    if family is MINISTRAL:
        known = set(MINISTRAL.config_class().to_dict())
        carried = {name: value for name, value in carried.items() if name in known}
    count = kv_heads(base_config.to_dict())
    heads_named = spec.split_layers or spec.sliding_layers
    return family.config_class(
        **carried,
        layer_types=spec.layer_types,
        sliding_window=spec.sliding_window or spec.w_recent,
        w_recent=spec.w_recent if spec.sliding_layers else None,
        w_sink=spec.w_sink,
        learned_sinks=spec.learned_sinks,
        streaming_kv_heads=list(map(list, spec.streaming_heads(count))) if heads_named else None,
        hybrid_version=spec.version,
    )
