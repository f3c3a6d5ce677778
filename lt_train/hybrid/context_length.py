"""The number of tokens a model supports: the one place that reads max_position_embeddings and the scaling of rotary embeddings."""

from collections.abc import Mapping
from typing import Any


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence, from a model's config as a dict.

    Scaled rotary embeddings (YaRN, arXiv 2309.00071, and others) support original_max_position_embeddings x factor, even where
    max_position_embeddings is still the length before scaling. vLLM reads configs in the same way.
    """
    most = config["max_position_embeddings"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") or most
    return max(most, int(original * (rope.get("factor") or 1.0)))
