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


def check_sinks(config: Any) -> None:
    """
    Raises:
        ValueError: a config with sink tokens.
    """
    if getattr(config, "w_sink", 0):
        raise ValueError(
            f"w_sink: {config.w_sink}: vLLM's attention kernels know no sink tokens and would leave them out. Fix: convert with "
            "hybrid.sink: learned or hybrid.w_sink: 0, or evaluate this export with the built-in engine (backend: hybrid)"
        )
