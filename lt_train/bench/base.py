"""The model that a benchmark measures: a base with its weights, or a shape alone, whose random weights are made on the device.

Speed and memory do not depend on the values of weights, so a shape needs no download and no tokenizer.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.loading import hybrid_config
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import bar_if_it_takes_long, load_base_config, load_for_inference, load_weights
from lt_train.inference.tokenizer import load_tokenizer
from lt_train.recipe.schema import Model
from lt_train.runtime.devices import compute_device, compute_dtype
from lt_train.runtime.errors import UserError, shortened
from lt_train.runtime.sources import resolve_model
from lt_train.selection.choose import evenly_spread_layers

CONTEXT = 131072
"""Longer than some of the published models have, for any length to be measured."""


@dataclass(frozen=True)
class PublishedShape:
    """Sizes of a published model, from its config.json on the hub (`huggingface.co/<source>/blob/main/config.json`)."""

    source: str
    config: type[PreTrainedConfig]
    layers: int
    hidden: int
    heads: int
    key_heads: int
    mlp: int
    vocab_size: int
    head_size: int
    tied: bool = False

    def as_config(self) -> PreTrainedConfig:
        return self.config(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocab_size,
            head_dim=self.head_size,
            tie_word_embeddings=self.tied,
            max_position_embeddings=CONTEXT,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )


SHAPES = {
    "135m": PublishedShape("HuggingFaceTB/SmolLM2-135M", LlamaConfig, 30, 576, 9, 3, 1536, 49152, 64, tied=True),
    "0.5b": PublishedShape("Qwen/Qwen2.5-0.5B", Qwen2Config, 24, 896, 14, 2, 4864, 151936, 64, tied=True),
    "1.5b": PublishedShape("Qwen/Qwen2.5-1.5B", Qwen2Config, 28, 1536, 12, 2, 8960, 151936, 128, tied=True),
    "8b": PublishedShape("Qwen/Qwen3-8B", Qwen3Config, 36, 4096, 32, 8, 12288, 151936, 128),
    "32b": PublishedShape("Qwen/QwQ-32B", Qwen2Config, 64, 5120, 40, 8, 27648, 152064, 128),
}


@dataclass(frozen=True)
class StoredBase:
    """A base with its weights and its tokenizer, as in a recipe's `model` part."""

    model: Model

    @property
    def name(self) -> str:
        return self.model.base

    def config(self) -> PreTrainedConfig:
        return load_base_config(self.model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model)

    def for_inference(self, spec: HybridSpec) -> HybridForCausalLM:
        return load_for_inference(self.model, spec, compute_dtype(self.model.dtype))

    def for_training(self, spec: HybridSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, HybridForCausalLM]:
        """The unconverted model, and the hybrid."""
        with bar_if_it_takes_long(self.model):
            stock = AutoModelForCausalLM.from_pretrained(resolve_model(self.model.base), dtype=dtype)
        return stock, load_weights(self.model, spec, dtype)


@dataclass(frozen=True)
class RandomBase:
    """A config alone. `dtype` as in `model.dtype`."""

    name: str
    base_config: PreTrainedConfig
    dtype: str = "auto"

    def config(self) -> PreTrainedConfig:
        """A copy: trainers change the config of their model."""
        return deepcopy(self.base_config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A placeholder that has a padding and an eos token: token ids are random, and no text is read."""
        words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")

    def for_inference(self, spec: HybridSpec) -> HybridForCausalLM:
        return _random(hybrid_config(self.config(), spec), compute_dtype(self.dtype)).eval()

    def for_training(self, spec: HybridSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, HybridForCausalLM]:
        """The unconverted model, and the hybrid with the same weights."""
        stock, hybrid = (_random(config, dtype) for config in (self.config(), hybrid_config(self.config(), spec)))
        hybrid.load_state_dict(stock.state_dict())
        return stock, hybrid


Base = StoredBase | RandomBase


def hybrid_spec(config: PreTrainedConfig, ratio: float, w_sink: int, w_recent: int) -> HybridSpec:
    """A hybrid in which this ratio of the base's full layers streams, evenly spread: for speed it does not matter which.

    Args:
        ratio: 0: nothing streams.

    Raises:
        UserError: none or all of them would.
    """
    base = base_spec(config.to_dict(), w_sink, w_recent)
    if ratio == 0:
        return base
    places = evenly_spread_layers(ratio, len(base.full_in_base))
    return replace(base, lazy_layers=tuple(base.full_in_base[place] for place in places))


def of_full_layers(spec: HybridSpec) -> str:
    """How many layers stream, of which, in words."""
    kind = "full layers" if spec.sliding_layers else "layers"
    return f"{len(spec.lazy_layers)} of {len(spec.full_in_base)} {kind}"


def named_base(model: str | None, shape: str | None) -> Base:
    """The base of a command's MODEL or `--shape`: a name of SHAPES, or a config.json (or its folder).

    Raises:
        UserError: both or neither given; no such shape; a config that cannot become a hybrid.
    """
    if (model is None) == (shape is None):
        problem = "neither is given" if model is None else f"{shortened(model)} and {shortened(str(shape))}: both are given"
        raise UserError(f"MODEL or --shape: {problem}. Fix: name a model, or one of --shape {', '.join(SHAPES)}")
    return StoredBase(Model(base=model)) if model is not None else random_base(str(shape))


def random_base(shape: str) -> RandomBase:
    if shape in SHAPES:
        return RandomBase(f"{shape} (shape of {SHAPES[shape].source}, random weights)", SHAPES[shape].as_config())
    path = Path(shape)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--shape: {shortened(shape)}: no such shape, and no config.json. "
            f"Fix: name one of {', '.join(SHAPES)}, or a config.json"
        )
    return RandomBase(f"{shape} (random weights)", load_base_config(Model(base=str(folder.absolute()))))


def _random(config: PreTrainedConfig, dtype: torch.dtype) -> HybridForCausalLM:
    with torch.device(compute_device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
