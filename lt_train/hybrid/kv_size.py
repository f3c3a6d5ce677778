"""What keys and values weigh: the one calculation behind every table, the engine's budget and the model card."""

from collections.abc import Mapping
from typing import Any


def head_size(config: Mapping[str, Any]) -> int:
    """Values of one head's key, from a model's config as a dict."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def entry_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of the key and the value of one token in one layer, in numbers of `itemsize` bytes."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return 2 * heads * head_size(config) * itemsize
