"""Bytes of keys and values: the one calculation behind every table, the engine's budget, the plan and the model card."""

from collections.abc import Mapping
from typing import Any

from .spec import HybridSpec

KV_TOKENS = 32_768
"""Tokens of the sequence whose KV cache the results table, the report and the model card state."""


def head_size(config: Mapping[str, Any]) -> int:
    """Elements of one head's key, from a model's config as a dict."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def token_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of the key and the value of one cached token of one layer.

    Args:
        itemsize: bytes of one element of the cache.
    """
    return kv_heads(config) * head_bytes(config, itemsize)


def kv_heads(config: Mapping[str, Any]) -> int:
    """Key/value heads of each layer, from a model's config as a dict."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def head_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of the key and the value of one cached token of one KV head."""
    return 2 * head_size(config) * itemsize


def kv_bytes(config: Mapping[str, Any], spec: HybridSpec, tokens: int, itemsize: int) -> int:
    """Bytes of the KV cache of one sequence of `tokens` tokens: what streams holds no more than its window.

    Args:
        config: of the base or of the hybrid, as a dict.
        spec: what streams; `spec.all_full` gives the size of the base's cache.
        itemsize: bytes of one element of the cache.
    """
    return head_bytes(config, itemsize) * spec.cached_tokens(tokens, kv_heads(config))


def saved_itemsize(config: Mapping[str, Any]) -> int:
    """Bytes of one element in the dtype that a config names; without one it is fp32."""
    return 4 if config.get("dtype") in (None, "float32") else 2
