"""The spec of a base, in which nothing streams: its layers have full attention or, in some families, a window of their own."""

from collections.abc import Mapping
from typing import Any

from .spec import STREAMING, HybridError, HybridSpec


def base_spec(config: Mapping[str, Any], w_sink: int = 4, w_recent: int = 1020) -> HybridSpec:
    """
    Args:
        config: of a base, or of a hybrid of it, as a dict.
        w_sink, w_recent: sizes of what streams in the hybrids that are made from it.

    Raises:
        HybridError: sliding layers without a window.
    """
    layers = sliding_layers(config)
    window = config["sliding_window"] if layers else 0
    if window is None:
        raise HybridError(
            f"sliding_window: missing, and layer_types names {len(layers)} sliding layers. Fix: set it in a copy of the base's "
            "config.json (of Qwen, use_sliding_window to true as well)"
        )
    return HybridSpec(config["num_hidden_layers"], (), w_sink, w_recent, sliding_layers=layers, sliding_window=window)


def sliding_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that have a window in the base.

    Args:
        config: of a base, or of a hybrid of it, as a dict. With `w_recent` in it, `layer_types` are the base's.
    """
    if "hybrid_version" in config and config.get("w_recent") is None:
        return ()
    if config.get("layer_types") is not None:
        return tuple(layer for layer, kind in enumerate(config["layer_types"]) if kind == STREAMING)
    return () if config.get("sliding_window") is None else tuple(range(config["num_hidden_layers"]))
