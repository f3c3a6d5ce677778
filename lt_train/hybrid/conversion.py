"""The config of a hybrid, made from its base's."""

from transformers import PreTrainedConfig

from .configuration import HybridConfig
from .families import MINISTRAL
from .modeling import Family
from .spec import HybridSpec, version_for

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
    "hybrid_version",
}


def config_in(family: Family, base_config: PreTrainedConfig, spec: HybridSpec) -> HybridConfig:
    """All that the base's config says, in the family's class, with the layers and sizes of `spec`."""
    carried = {name: value for name, value in base_config.to_dict().items() if name not in _NOT_CARRIED_OVER}
    if family is MINISTRAL:
        known = set(MINISTRAL.config_class().to_dict())
        carried = {name: value for name, value in carried.items() if name in known}
    return family.config_class(
        **carried,
        layer_types=spec.layer_types,
        sliding_window=spec.w_recent,
        w_sink=spec.w_sink,
        learned_sinks=spec.learned_sinks,
        hybrid_version=version_for(spec.learned_sinks),
    )
