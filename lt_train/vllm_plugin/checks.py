"""What the plugin refuses to serve. Without vLLM's modules, so that it can be tested without them."""

from typing import Any

VERSION = "0.32"
"""The version of vLLM whose classes the plugin extends."""

ANY_VERSION = "LT_TRAIN_ANY_VLLM"
"""Environment variable that allows another version."""


def check_version(version: str, allowed: str | None) -> None:
    """
    Raises:
        ValueError: a version of vLLM that the plugin was not written for.
    """
    if not version.startswith(f"{VERSION}.") and not allowed:
        raise ValueError(
            f"vLLM {version}: lt_train's plugin extends classes of vLLM {VERSION} and was not checked with others. Fix: install "
            f"vllm=={VERSION}.0, or set {ANY_VERSION}=1 and compare its answers with the built-in engine's first"
        )


FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "ministral")
"""By the `model_type` of a base or of an export without its prefix: those that differ from vLLM's Llama in what model.py knows."""


def serves_family(model_type: str) -> bool:
    return model_type.removeprefix("lt_hybrid_") in FAMILIES


def check_served(config: Any) -> None:
    """
    Raises:
        ValueError: a family other than those of FAMILIES, a config with split layers, with sliding layers of the base, or with
            sink tokens.
    """
    if not serves_family(config.model_type):
        raise ValueError(
            f"model_type: {config.model_type}: lt_train's plugin computes {', '.join(FAMILIES)} by vLLM's Llama classes, and this "
            "family differs from them. Fix: evaluate this export with the built-in engine (backend: hybrid), or serve it with "
            "lt-train serve"
        )
    if getattr(config, "w_recent", None):
        raise ValueError(
            f"w_recent: {config.w_recent}: some layers have a window of {config.sliding_window} tokens in the base and others one "
            "of this size, and lt_train's plugin computes one window. Fix: evaluate this export with the built-in engine "
            "(backend: hybrid), or serve it with lt-train serve"
        )
    if getattr(config, "streaming_kv_heads", None):
        raise ValueError(
            "streaming_kv_heads: single KV heads of a layer stream, and vLLM's KV cache holds the same tokens for all of them. "
            "Fix: convert by entire layers (hybrid.granularity: layer), evaluate this export with the built-in engine "
            "(backend: hybrid), or serve it with lt-train serve"
        )
    if getattr(config, "w_sink", 0):
        raise ValueError(
            f"w_sink: {config.w_sink}: vLLM's attention kernels know no sink tokens and would leave them out. Fix: convert with "
            "hybrid.sink: learned or hybrid.w_sink: 0, or evaluate this export with the built-in engine (backend: hybrid)"
        )
