"""The number of tokens a model supports: the one place that reads max_position_embeddings and the scaling of rotary embeddings."""

from collections.abc import Mapping
from typing import Any


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence, from a model's config as a dict.

    Scaled rotary embeddings (YaRN, arXiv 2309.00071, and others) support original_max_position_embeddings x factor, even where
    max_position_embeddings is still the length before scaling. Not with llama3, whose factor is no ratio of lengths: Llama 3.2 has
    32, for 8,192 tokens that became 131,072. vLLM has the same exception (config/model.py, _get_and_verify_max_len); of YaRN, 0.32
    takes max_position_embeddings alone, which `model.rope_scaling` and so our exports set to the scaled length.
    """
    most = config["max_position_embeddings"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "llama3":
        return most
    original = rope.get("original_max_position_embeddings") or most
    return max(most, int(original * (rope.get("factor") or 1.0)))
