"""The config files of an export: the hybrid's own with its code named beside it, or those of a stock class that computes it."""

import copy

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.ministral import MinistralConfig, MinistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from lt_train.export.code_files import entry_module
from lt_train.export.granite_swa import granite_swa_config, is_granite_swa
from lt_train.hybrid.configuration import (
    HybridConfig,
    HybridMinistralConfig,
    HybridQwen2Config,
    HybridQwen3Config,
    HybridSmolLM3Config,
)
from lt_train.hybrid.loading import is_declared
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.generation_config import consistent, listed
from lt_train.runtime.errors import UserError

STOCK: dict[type[HybridConfig], tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    HybridQwen2Config: (Qwen2Config, Qwen2ForCausalLM),
    HybridQwen3Config: (Qwen3Config, Qwen3ForCausalLM),
    HybridMinistralConfig: (MinistralConfig, MinistralForCausalLM),
    HybridSmolLM3Config: (SmolLM3Config, SmolLM3ForCausalLM),
}
"""What computes a hybrid without sinks: a plain sliding window in some layers, which these know, and other families do not."""

_OF_HYBRIDS = {"w_sink", "learned_sinks", "streaming_kv_heads", "w_recent", "hybrid_version"}
_NOT_STOCK = {"model_type", "architectures", "auto_map", "transformers_version"} | _OF_HYBRIDS


def needs_own_code(config: HybridConfig) -> bool:
    """Sink tokens, layers of which some KV heads stream, and windows of two sizes are known to no stock class, and a window in some
    layers to few."""
    spec = config.spec
    own = config.learned_sinks or spec.split_layers or spec.sliding_layers
    return not is_granite_swa(config) and (config.w_sink > 0 or bool(own) or type(config) not in STOCK)


def exported_config(model: HybridForCausalLM, dtype: torch.dtype) -> PreTrainedConfig:
    """The config.json of an export of `model`, as a new object."""
    config: PreTrainedConfig
    if is_granite_swa(model.config):
        config = granite_swa_config(model)
    else:
        config = _with_own_code(model) if needs_own_code(model.config) else stock_config(model.config)
    config.dtype = dtype
    return config


def stock_config(config: HybridConfig) -> PreTrainedConfig:
    """A hybrid without sinks and split layers as a config of the stock class with the same `layer_types`."""
    config_class, model_class = STOCK[type(config)]
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_STOCK}
    if "use_sliding_window" in values:
        values["use_sliding_window"] = True
    if "max_window_layers" in values:
        # layer_types decides. Software that reads max_window_layers instead cannot express a hybrid; vLLM's own Qwen2 class stops
        # with an error unless it equals num_hidden_layers, and then runs full attention everywhere. So it never does.
        lazy = config.spec.lazy_layers
        values["max_window_layers"] = lazy[0] if lazy else 0
    return config_class(**values, architectures=[model_class.__name__])


def exported_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's defaults for sampling, with every token that ends an answer and one for padding.

    Raises:
        UserError: no token ends an answer, or the base's settings contradict each other.
    """
    config = GenerationConfig.from_dict(consistent(model.generation_config.to_dict()))
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = list(dict.fromkeys([*of_tokenizer, *listed(config.eos_token_id)]))
    if not stops:
        raise UserError(
            "neither the tokenizer nor the generation config names an end-of-sequence token: the exported model would never stop. "
            "Set eos_token in the base's tokenizer_config.json"
        )
    config.eos_token_id = stops
    config.pad_token_id = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(f"model.base: its generation_config.json contradicts itself: {error}. Fix: correct it there") from error
    return config


def _with_own_code(model: HybridForCausalLM) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # All through the same file: transformers keeps one copy of the code per file named here, and two would mean two HybridErrors.
    module = entry_module(config)
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{module}.{type(model).__name__}",
    }
    if is_declared(config):  # vLLM without our plugin makes it, too, and then reports the attention that it cannot replace
        config.auto_map["AutoModel"] = f"{module}.{type(model.model).__name__}"
    return config
