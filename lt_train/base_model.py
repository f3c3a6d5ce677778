"""The recipe's base model: its config, its tokenizer, its weights in the hybrid classes. Every failure says what was named."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from lt_train.devices import compute_device
from lt_train.errors import UserError
from lt_train.hybrid import HybridError, HybridForCausalLM, HybridSpec, load_hybrid
from lt_train.recipe import Model
from lt_train.sources import resolve_model

_LONG_LOAD_BYTES = 2 * 2**30


def load_base_config(model: Model) -> PreTrainedConfig:
    """
    Raises:
        UserError: no such folder or hub model, or no config that transformers reads.
    """
    with _failures_named(model, "config"):
        return AutoConfig.from_pretrained(
            resolve_model(model.base), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding on the left as generation needs it.

    Raises:
        UserError: none there, or one without a padding token and without an eos to stand in.
    """
    with _failures_named(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(model.base), revision=model.revision, trust_remote_code=model.trust_remote_code, padding_side="left"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.base: {model.base}: its tokenizer has neither a padding nor an eos token. Give it an eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_ids(model: Model) -> list[int]:
    """The tokens at which the base's own generation config stops; empty where it has none."""
    try:
        generation = GenerationConfig.from_pretrained(resolve_model(model.base), revision=model.revision)
    except OSError:  # a base need not have one
        return []
    found = generation.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def load_weights(model: Model, spec: HybridSpec, dtype: torch.dtype, **from_pretrained: Any) -> HybridForCausalLM:
    """The base's weights in the hybrid class of its architecture; an empty `spec.lazy_layers` gives the base itself.

    Raises:
        UserError: no weights, or files that are cut or do not fit. HybridError: a base that cannot become a hybrid.
    """
    with _failures_named(model, "weights"), _bar_if_it_takes_long(model):
        return load_hybrid(
            resolve_model(model.base),
            spec,
            dtype=dtype,
            revision=model.revision,
            streaming_kernel=model.attention,
            **from_pretrained,
        )


def load_for_inference(model: Model, spec: HybridSpec, dtype: torch.dtype) -> HybridForCausalLM:
    """As `load_weights`, on the accelerator; on several, if this process sees them, layers are spread over them."""
    several = torch.accelerator.is_available() and torch.accelerator.device_count() > 1
    return load_weights(model, spec, dtype, device_map="auto" if several else {"": compute_device()})


@contextmanager
def _bar_if_it_takes_long(model: Model) -> Iterator[None]:
    """transformers shows a bar for every load; for weights that are there at once it is only in the way."""
    folder = Path(resolve_model(model.base))
    if not folder.is_dir() or sum(file.stat().st_size for file in folder.glob("*.safetensors")) > _LONG_LOAD_BYTES:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def _failures_named(model: Model, what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, HybridError):
        raise
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {model.revision}" if model.revision else ""
        raise UserError(f"model.base: {model.base}{at}: its {what} cannot be loaded: {first}") from error
