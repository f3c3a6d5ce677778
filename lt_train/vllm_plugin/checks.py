"""Checks of what the plugin serves. They import no vLLM, so that they can be tested without it."""

from dataclasses import dataclass
from typing import Any, Literal

from lt_train.hybrid.spec import GRANITE_SWA, HybridSpec

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


GRANITE_SWA_FAMILIES = ("qwen2", "llama", "mistral", "ministral", "seed_oss", "granite")
"""Likewise, those with Granite's layers: no norms of queries and keys, and rotary embeddings of the whole head in every layer."""


def fits_granite_swa(model_type: str, spec: HybridSpec) -> bool:
    """Whether GraniteSWA, a class of transformers and of vLLM, computes a hybrid: it has learned sinks, and windows of one size."""
    return family_of(model_type) in GRANITE_SWA_FAMILIES and spec.learned_sinks and not spec.sliding_layers


def is_served(model_type: str, spec: HybridSpec) -> bool:
    """Whether vLLM serves a hybrid, by the plugin or by itself."""
    return fits_granite_swa(model_type, spec) or (family_of(model_type) in FAMILIES and not spec.sliding_layers)


def family_of(model_type: str) -> str:
    return model_type.removeprefix("lt_hybrid_")


def check_served(config: Any) -> None:
    """
    Raises:
        ValueError: neither GraniteSWA, which vLLM's own class computes, nor one of FAMILIES, or a config with sliding layers of
            the base.
    """
    if config.model_type == GRANITE_SWA:
        return
    if family_of(config.model_type) not in FAMILIES:
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


@dataclass(frozen=True)
class Settings:
    """The settings of vLLM that decide whether it computes a hybrid.

    Attributes:
        kv_dtype: of its KV cache; auto: that of the model.
        frees_outside_window: its hybrid KV cache manager is on.
        transfers_kv: a KV connector takes the cache elsewhere.
    """

    platform: Literal["cpu", "gpu", "other"] = "cpu"
    tensor_parallel: int = 1
    kv_dtype: str = "auto"
    frees_outside_window: bool = True
    transfers_kv: bool = False
    speculates: bool = False


def check_settings(spec: HybridSpec, settings: Settings) -> None:
    """
    Raises:
        ValueError: split layers over several processes, or sink tokens with what was not written for them.
    """
    if spec.split_layers and settings.tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel_size: {settings.tensor_parallel}: single KV heads of a layer stream, and each process would have "
            "another number of them, where vLLM's KV cache is the same in all. Fix: remove the setting, and start several servers"
        )
    if not spec.w_sink:
        return
    by = f"with sink tokens (w_sink: {spec.w_sink})"
    if settings.platform == "other":
        raise ValueError(f"device: {by} lt_train's plugin computes on CPUs and on GPUs of CUDA or ROCm. Fix: use one of these")
    if settings.kv_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype: {settings.kv_dtype}: {by} lt_train's plugin caches in the model's dtype. Fix: set it to auto"
        )
    if not settings.frees_outside_window:
        raise ValueError(f"disable_hybrid_kv_cache_manager: {by} lt_train's plugin needs this manager. Fix: remove the setting")
    if settings.transfers_kv:
        raise ValueError(f"kv_transfer_config: {by} no KV connector transfers the cache. Fix: remove it")
    if settings.speculates:
        raise ValueError(f"speculative_config: {by} lt_train's plugin was not checked with a draft. Fix: remove it")
