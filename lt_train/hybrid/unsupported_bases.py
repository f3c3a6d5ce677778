"""Why a base cannot become a hybrid: the module and what it computes that streaming layers, caches or kernels do not."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .auto_family import stock_classes
from .base_spec import sliding_layers
from .modeling import attention_at
from .spec import FULL, STREAMING, HybridError

OTHER = "Fix: choose another base"

REDUCED = {
    "vocab_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 32,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
}
"""Sizes that change nothing in what a layer computes, and the most of each that a small model has."""


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A base's config with all its layers and settings, but narrow: a model of it is built and run in seconds."""
    values = config.to_dict()
    heads = config.num_attention_heads
    key_heads = values.get("num_key_value_heads") or heads
    sizes = {name: min(most, values[name]) for name, most in REDUCED.items() if isinstance(values.get(name), int)}
    grouped = max(1, min(4, heads) // max(1, heads // key_heads)) if heads != key_heads else 2
    sizes["num_attention_heads"] = 4 if heads != key_heads else 2
    if values.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = grouped
    sizes["hidden_size"] = sizes["num_attention_heads"] * min(32, values.get("head_dim") or config.hidden_size // heads)
    tokens = {name: number for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))}
    return type(config)(**{**values, **sizes, **tokens, "dtype": "float32"})


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """
    Raises:
        HybridError: names the first module or setting of the base that a hybrid cannot compute.
    """
    for fault in _faults_of_settings(config):
        raise HybridError(fault)
    stock_class = stock_classes(config.model_type)[1]
    try:
        with torch.device("meta"):
            model = stock_class(small_config(config))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name = type(error).__name__
        raise HybridError(
            f"{stock_class.__name__}: a small model of this config cannot be built ({name}: {error}). {OTHER}"
        ) from error
    for fault in _faults_of_modules(model):
        raise HybridError(fault)
    for fault in faults_of_windows(config):
        raise HybridError(fault)


def faults_of_windows(config: PreTrainedConfig) -> Iterator[str]:
    """Why no layer of a base can stream, or in what it could not stay as it is, where its layers have windows."""
    values = config.to_dict()
    sliding = sliding_layers(values)
    if len(sliding) == config.num_hidden_layers:
        yield (
            f"sliding_window: {config.sliding_window}: every layer of the base ({config.model_type}) sees this many tokens from "
            "the start, and only full layers can stream. Fix: choose a base with full layers; if no sequence is longer than the "
            "window, set sliding_window to null (of Qwen, use_sliding_window to false) in a copy of its config.json"
        )
    if FULL in (values.get("rope_parameters") or {}) and not sliding:
        problem = "rotary embeddings for each type of layer, and all layers of one type"
        yield f"layer_types: {config.model_type} has {problem}. {OTHER}"


def faults_of_rotary_embeddings(config: PreTrainedConfig) -> Iterator[str]:
    """transformers computes one set of frequencies for all rows of a batch: those for its longest position."""
    rope = config.to_dict().get("rope_parameters") or {}
    for kind in {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)} & {"dynamic", "longrope"}:
        problem = "its frequencies change with the length of a sequence, and cached keys would keep the old ones"
        fix = OTHER
        if kind == "dynamic":
            fix += "; if no sequence is longer than max_position_embeddings, take the scaling out in a copy of its config.json"
        yield f"rope_parameters: rope_type {kind}: {problem}. {fix}"


def _faults_of_settings(config: PreTrainedConfig) -> Iterator[str]:
    values = config.to_dict()
    if config.is_encoder_decoder or values.get("add_cross_attention"):
        yield f"{config.model_type}: an encoder and cross-attention, of which a hybrid has none. Fix: choose a decoder alone"
    if config.get_text_config() is not config:
        yield f"{config.model_type}: a model of several parts. Fix: choose its language model alone"
    for name in ("num_attention_heads", "num_key_value_heads"):
        if isinstance(getattr(config, name, None), list | tuple):
            yield f"{name}: {getattr(config, name)}: layers with different numbers of heads, of which a cache has one. {OTHER}"
    if getattr(config, "num_attention_heads", None) is None:
        yield f"{config.model_type}: no attention in it, and only attention can stream. {OTHER}"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.get(name):
            yield f"{name}: {values[name]}: no kernel of a hybrid caps scores or logits. {OTHER}"
    if values.get("kv_lora_rank"):
        problem = "latent attention caches no keys and values of heads, and a streaming layer keeps these"
        yield f"self_attn of every layer: kv_lora_rank {values['kv_lora_rank']}: {problem}. {OTHER}"
    yield from faults_of_rotary_embeddings(config)
    if values.get("use_bidirectional_attention"):
        yield f"use_bidirectional_attention: True: tokens see later ones, and a hybrid's attention is causal. {OTHER}"
    if values.get("alibi"):
        yield f"alibi: attention with biases of positions, which the kernels lack. {OTHER}"
    kinds: dict[str, list[int]] = {}
    for layer, kind in enumerate(values.get("layer_types") or ()):
        kinds.setdefault(kind, []).append(layer)
    for kind, layers in kinds.items():
        if kind not in (FULL, STREAMING):
            yield f"layer_types: layers {_listed(layers)}: {kind}: only full attention can become streaming attention. {OTHER}"


def _faults_of_modules(model: PreTrainedModel) -> Iterator[str]:
    stack = getattr(model, "model", None)
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if getattr(stack, name, None) is None:
            problem = "missing: a hybrid runs embedding, layers and norm by their names in Llama"
            yield f"model.{name} of {type(model).__name__}: {problem}. {OTHER}"
            return
    if getattr(model, "lm_head", None) is None:
        yield f"lm_head of {type(model).__name__}: missing. {OTHER}"
    shapes = {}
    assert stack is not None, "it has layers"
    for index, layer in enumerate(stack.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            kinds = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
            yield f"model.layers.{index}: no self_attn among {kinds}: only attention can stream. {OTHER}"
            return
        at = attention_at(index, attention)
        if any("cross" in name or "encoder" in name for name, _ in layer.named_children()):
            yield f"model.layers.{index} ({type(layer).__name__}): cross-attention, of which a hybrid has none. {OTHER}"
        if getattr(attention, "layer_idx", None) != index:
            yield f"{at}: its layer_idx is not {index}, and by it a layer gets what it sees. {OTHER}"
        if isinstance(getattr(attention, "sinks", None), nn.Parameter):
            yield f"{at}: learned sinks of the base, which only declared families have. {OTHER}"
        shapes[index] = {name: tuple(weight.shape) for name, weight in attention.named_parameters()}
        if shapes[index] != shapes[0]:
            yield f"{at}: other weights than in layer 0, so caches of different sizes. {OTHER}"


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (", …" if len(layers) > 4 else "")
