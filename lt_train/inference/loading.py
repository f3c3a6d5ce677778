"""The recipe's base model: its config, and its weights in the hybrid classes. Every failure names the setting."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from lt_train.hybrid.attention_kernels import AUTO, Choice, Use, choose
from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.configuration import is_hybrid
from lt_train.hybrid.kv_size import head_size, kv_heads
from lt_train.hybrid.loading import (
    build_hybrid,
    family_of,
    hybrid_config,
    is_declared,
    load_hybrid,
    prove_auto_family,
    read_config,
    refuse_undeclared,
)
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import FULL, HybridError, HybridSpec
from lt_train.inference.generation_config import consistent, listed
from lt_train.inference.sinks_file import read_sinks
from lt_train.recipe.schema import Model, RopeScaling
from lt_train.runtime.devices import compute_device, compute_dtype
from lt_train.runtime.errors import UserError, kind_of
from lt_train.runtime.progress import without_bars_of_transformers
from lt_train.runtime.sources import resolve_model

_LONG_LOAD_BYTES = 2 * 2**30
_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError, StrictDataclassError)
"""What transformers raises at missing, truncated or other weights; anything else is a bug in the hybrid classes."""


def load_base_config(model: Model) -> PreTrainedConfig:
    """
    Raises:
        UserError: no such folder or hub model, no config that transformers reads, or a base that cannot become a hybrid; with
            `model.family: auto`, what differed.
    """
    with failures_named(model, "config"):
        config = AutoConfig.from_pretrained(
            resolve_model(model.base), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    with failures_named(model, "config", _UNLOADABLE):
        if model.family is None:
            refuse_undeclared(config)  # first, because a config of another kind need not count its layers
        _check_sizes(config.to_dict())
        if is_hybrid(config) and config.learned_sinks:
            raise ValueError(
                f"a hybrid ({config.model_type}) with learned sinks, without which its full layers would be another model. "
                "Fix: name the base that it was made from"
            )
        config = with_rope_scaling(config, model.rope_scaling)
        if model.family == "auto" and not is_declared(config):
            prove_auto_family(config)
        hybrid_config(config, base_spec(config.to_dict()))
    return config


def _check_sizes(config: dict[str, Any]) -> None:
    """Raises ValueError for sizes and rotary embeddings of which no model can be made: transformers' configs take them."""
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        size = config.get(name)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name}: {size}: below 1. Fix: download the base again")
    heads, groups = config["num_attention_heads"], kv_heads(config)
    if heads % groups:
        raise ValueError(f"num_key_value_heads: {groups}: no divisor of {heads} query heads. Fix: download the base again")
    rope = config.get("rope_parameters") or {}
    for kind in {each.get("rope_type", "default") for each in (rope, *rope.values()) if isinstance(each, dict)}:
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_parameters: rope_type {kind}: unknown to this transformers. Fix: install a newer one")


def describe_proof(config: PreTrainedConfig) -> str:
    """The proof of a base whose family is not declared, in words (see `prove_auto_family`)."""
    within = " within the window of its sliding layers" if base_spec(config.to_dict()).sliding_layers else ""
    return (
        f"auto: a hybrid of {config.model_type} was made, and proved on a small model: with full attention it is the base to the "
        f"last bit{within}, each layer sees what it should, and cached, packed and padded documents are computed as alone"
    )


def with_rope_scaling(config: PreTrainedConfig, scaling: RopeScaling | None) -> PreTrainedConfig:
    """A config whose rotary embeddings are scaled as the recipe sets (`model.rope_scaling`).

    Raises:
        UserError: a family that transformers scales in no such way.
    """
    if scaling is None:
        return config
    if FULL in config.rope_parameters:
        raise UserError(
            f"model.rope_scaling: {scaling.rope_type}: {config.model_type} has rotary embeddings for each type of layer. "
            "Fix: leave rope_scaling out, or scale rope_parameters of full_attention in a copy of its config.json"
        )
    if config.model_type == "gpt_oss":
        raise UserError(
            f"model.rope_scaling: {scaling.rope_type}: gpt_oss is scaled by {config.rope_parameters['rope_type']} already, to "
            f"{config.max_position_embeddings:,} tokens. Fix: leave rope_scaling out, or change rope_parameters in a copy of its "
            "config.json"
        )
    if config.model_type == "phi3":
        raise UserError(
            f"model.rope_scaling: {scaling.rope_type}: transformers' phi3 has no scaling but longrope. Fix: leave rope_scaling out"
        )
    kept = {name: value for name, value in config.rope_parameters.items() if name in ("rope_theta", "partial_rotary_factor")}
    rope = {**kept, **scaling.model_dump(exclude_none=True)}
    changes: dict[str, Any] = {"rope_parameters": rope}
    if scaling.rope_type == "yarn":  # transformers warns of a config whose two statements about its context differ
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        changes["max_position_embeddings"] = int(rope["original_max_position_embeddings"] * scaling.factor)
    return type(config)(**{**config.to_dict(), **changes})


def eos_ids(model: Model) -> list[int]:
    """The tokens at which the base's own generation config stops; empty where it has none.

    Raises:
        UserError: it has one that cannot be read.
    """
    with failures_named(model, "generation config"):
        return listed(_generation_settings(model).get("eos_token_id"))


def _generation_settings(model: Model) -> dict[str, Any]:
    """The base's generation_config.json; empty where it has none, as a base need not."""
    try:
        file = cached_file(resolve_model(model.base), GENERATION_CONFIG_NAME, revision=model.revision)
    except OSError:
        file = None
    if file is None:
        return {}
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"it is {kind_of(settings)}, not settings")
    return consistent(settings)


def attention_choice(model: Model, config: PreTrainedConfig, trains: bool) -> Choice:
    """The attention kernel for this process's device, chosen before any weights are loaded.

    Raises:
        UserError: `model.attention` names a kernel that cannot do it here.
    """
    try:
        return choose(model.attention, Use(compute_device(), compute_dtype(model.dtype), head_size(config.to_dict()), trains))
    except HybridError as error:
        raise UserError(f"model.{error}") from error


def load_weights(
    model: Model, spec: HybridSpec, dtype: torch.dtype, *, sinks: Path | None = None, **from_pretrained: Any
) -> HybridForCausalLM:
    """The base's weights in the hybrid class of its architecture; an empty `spec.lazy_layers` gives the base itself.

    Args:
        sinks: the file of the learned sinks, if the spec has them. Without it they are 0.

    Raises:
        UserError: a base that cannot become a hybrid, no weights, or files that are truncated or do not fit.
    """
    config = load_base_config(model)
    with failures_named(model, "generation config"):
        settings = _generation_settings(model)
        if settings:  # checked by transformers, too
            from_pretrained = {"generation_config": GenerationConfig.from_dict(settings), **from_pretrained}
    with failures_named(model, "weights", _UNLOADABLE), bar_if_it_takes_long(model):
        hybrid = load_hybrid(
            resolve_model(model.base),
            spec,
            dtype=dtype,
            config=config,
            revision=model.revision,
            attention_kernel=model.attention,
            **from_pretrained,
        )
    if sinks is not None:
        read_sinks(hybrid, sinks)
    return hybrid


def empty_hybrid(model: Model, spec: HybridSpec, base_config: PreTrainedConfig) -> HybridForCausalLM:
    """The model of `load_weights`, without any weights: they are on the meta device."""
    with torch.device("meta"):
        hybrid = build_hybrid(base_config, spec)
    with failures_named(model, "generation config"):
        settings = _generation_settings(model)
        if settings:
            hybrid.generation_config = GenerationConfig.from_dict(settings)
    return hybrid


def empty_checkpoint(folder: Path) -> HybridForCausalLM:
    """The model of `load_hybrid_checkpoint`, without any weights: they are on the meta device."""
    config = read_config(folder)
    with torch.device("meta"):
        hybrid = family_of(config).model_class(config)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        hybrid.generation_config = GenerationConfig.from_pretrained(folder)
    return hybrid


def load_for_inference(
    model: Model, spec: HybridSpec, dtype: torch.dtype, *, sinks: Path | None = None, others_wait: bool = False
) -> HybridForCausalLM:
    """As `load_weights`, on the accelerator. Alone with several of them, a process spreads the layers over all; so it does where
    the other processes of its launch wait for it and hold nothing (`others_wait`): afterwards, `release_memory`.

    In a dtype other than the one that `model.dtype` means here, attention is computed as by auto: the kernel that the recipe
    names need not know it.
    """
    if dtype != compute_dtype(model.dtype):
        model = model.model_copy(update={"attention": AUTO})
    return load_weights(model, spec, dtype, sinks=sinks, device_map=device_map(others_wait))


def device_map(others_wait: bool = False) -> str | dict[str, torch.device]:
    """The devices on which `from_pretrained` puts the layers of a model for inference."""
    alone = others_wait or "LOCAL_RANK" not in os.environ
    several = torch.accelerator.is_available() and torch.accelerator.device_count() > 1 and alone
    return "auto" if several else {"": compute_device()}


def bar_if_it_takes_long(model: Model) -> AbstractContextManager[None]:
    """The bar that transformers shows for every load, but not for weights that are there at once."""
    folder = Path(resolve_model(model.base))
    long = not folder.is_dir() or sum(file.stat().st_size for file in folder.glob("*.safetensors")) > _LONG_LOAD_BYTES
    return nullcontext() if long else without_bars_of_transformers()


@contextmanager
def failures_named(model: Model, what: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turn what other libraries raise at a faulty model into an error of one line that names the setting."""
    try:
        _check_hub(model)
        yield
    except UserError:
        raise
    except HybridError as error:
        raise UserError(f"model.base: {model.base}: {error}") from error
    except kinds as error:
        at = f" at revision {model.revision}" if model.revision else ""
        folder = Path(model.base).expanduser()
        where = "its" if folder.is_dir() else f"{_no_folder(folder)}, and of the hub model the"
        fix = "" if folder.is_dir() else ". Fix: name a folder that holds the model, or a hub id that this machine can reach"
        raise UserError(f"model.base: {model.base}{at}: {where} {what} cannot be loaded: {_in_one_line(error)}{fix}") from error


class _NotOnHub(OSError):
    """The hub has no such model, or is out of reach."""


def _check_hub(model: Model) -> None:
    """Query the hub once: transformers tries five times for each file, half a minute for a folder whose name is mistyped."""
    name = resolve_model(model.base)
    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json", revision=model.revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=model.revision))
    except Exception as error:  # no such model, gated, no network, switched off: dozens of kinds
        raise _NotOnHub(_in_one_line(error)) from error


def _no_folder(folder: Path) -> str:
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = get_close_matches(folder.name, siblings, n=1)
    return f"there is no folder {folder.absolute()}" + (f" (did you mean {folder.parent / near[0]}?)" if near else "")


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return reason if isinstance(error, OSError | ValueError) and reason else f"{type(error).__name__}: {reason}"
