"""A decoder that only these tests have, registered with transformers: attention and MLP side by side, and one fault on request."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lt_train.hybrid.cache import CACHE_ARGUMENT
from tests.support.families import SIZES

FAULTY = 2
"""The layer that has the fault."""


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    vocab_size: int = 96
    hidden_size: int = 48
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | list[int] = 2
    head_dim: int = 16
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    initializer_range: float = 0.02
    fault: str | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    experts: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.fault = config.fault if layer_idx == FAULTY else None
        self.config, self.head_dim = config, config.head_dim
        self.layer_idx = None if self.fault == "no index" else layer_idx
        queries, keys = config.num_attention_heads, 1 if self.fault == "fewer heads" else config.num_key_value_heads
        self.num_key_value_groups = queries // keys
        heads = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, count in heads.items():
            self.add_module(name, nn.Linear(config.hidden_size, count * config.head_dim, bias=False))
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any, cache: Any, **given: Any
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (make(hidden_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for make in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
            if self.fault == "cache":
                v = v.roll(1, dims=2)
        if self.fault == "positions":
            q = q * (1 + torch.arange(q.shape[2], device=q.device)[:, None])
        if self.fault == "kernel" and self.config._attn_implementation != "sdpa":
            q = q * 1.001
        if self.fault == "no interface":
            out = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True).transpose(1, 2)
        else:
            if self.fault == "no mask":
                attention_mask, given = None, {}
            if self.fault == "bias":
                given["position_bias"] = torch.zeros(1, q.shape[1], q.shape[2], k.shape[2])
            if self.fault == "softcap":
                given["softcap"] = 30.0
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **given)[0]
        if self.fault == "shifted":
            out = out.roll(1, dims=1)
        return self.o_proj(out.reshape(*hidden_BTD.shape[:2], -1))


class ToyExperts(nn.Module):
    """As many experts as the config says, each a module; which one all tokens go to is the rank of the process."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.experts))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.experts[int(os.environ.get("RANK", 0)) % len(self.experts)](hidden_BTD)


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ToyAttention(config, layer_idx)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp = ToyExperts(config) if config.experts else nn.Identity()

    def forward(self, hidden_BTD: Tensor, attention_mask: Any = None, cache: Any = None, **given: Any) -> Tensor:
        normed_BTD = self.norm(hidden_BTD)
        attended_BTD = self.self_attn(normed_BTD, attention_mask=attention_mask, cache=cache, **given)
        return hidden_BTD + attended_BTD + self.mlp(self.down_proj(torch.tanh(self.up_proj(normed_BTD))))


class ToyPreTrainedModel(PreTrainedModel):
    config: ToyConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("ToyLayer",)


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **given: Any,
    ) -> BaseModelOutputWithPast:
        cache = given.pop(CACHE_ARGUMENT, None)
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        masked = {"config": self.config, "inputs_embeds": hidden_BTD, "position_ids": position_ids, CACHE_ARGUMENT: cache}
        mask = create_causal_mask(attention_mask=attention_mask, **masked)
        mask_L = [mask] * len(self.layers)
        for layer, kind in enumerate(self.config.layer_types or ()):
            if kind == "sliding_attention" and not (self.config.fault == "no window" and layer == FAULTY):
                mask_L[layer] = create_sliding_window_causal_mask(attention_mask=attention_mask, **masked)
        position_embeddings = self.rotary_emb(hidden_BTD, position_ids)
        for layer, mask in zip(self.layers, mask_L, strict=True):
            hidden_BTD = layer(hidden_BTD, attention_mask=mask, cache=cache, position_embeddings=position_embeddings, **given)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTD))


class ToyForCausalLM(ToyPreTrainedModel, GenerationMixin):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        keep = given.pop("logits_to_keep", 0)
        logits = self.lm_head(self.model(input_ids, **given).last_hidden_state[:, -keep if keep else 0 :])
        if self.config.fault == "scaled logits":
            logits = logits * 0.5
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)

TOY = {name: value for name, value in SIZES.items() if name != "intermediate_size"}


def toy_config(fault: str | None = None, **changed: Any) -> ToyConfig:
    return ToyConfig(**{**TOY, **changed}, head_dim=16, fault=fault)
