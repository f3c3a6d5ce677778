"""Small configs of every base architecture, and a hybrid of them with split layers."""

from dataclasses import replace

import pytest
from torch import nn
from transformers import (
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.spec import HybridSpec

SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
BASES = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "smollm3": SmolLM3Config(**SIZES),  # layer 3 has no rotary embedding
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(  # layer 0 slides
        **SIZES,
        layer_types=["sliding_attention", *["full_attention"] * 3],
        sliding_window=11,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "seed_oss": SeedOssConfig(**SIZES, head_dim=16, attention_dropout=0.0, residual_dropout=0.0),
    "granite": GraniteConfig(
        **SIZES, embedding_multiplier=12.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=0.25
    ),
    "glm4": Glm4Config(**SIZES, head_dim=16),  # half of each head has rotary embedding
    "phi3": Phi3Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt_oss": GptOssConfig(  # layer 0 slides
        **SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", *["full_attention"] * 3],
        sliding_window=11,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        },
    ),
}

HELIUM = HeliumConfig(**SIZES, head_dim=12)
"""A family that is not declared: model.family: auto makes it."""

MINIMAX = MiniMaxM2Config(**{**SIZES, "intermediate_size": 32}, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
"""Another, whose routers have a buffer in the checkpoint."""

FAMILIES = (*BASES, "helium")
"""What the table of tests runs over."""

CORE = ("qwen3", "olmo3", "qwen3_moe")
"""What a test runs over where a family changes the class and not what is tested: dense, with sliding layers, with experts."""

WITH_SINKS = ("gpt_oss",)
"""Families whose bases have learned sinks: hybrids of them have no others, and no split layers."""


def base_of(family: str) -> PreTrainedConfig:
    """A base of this family; where it is not declared, the family is made first."""
    if family in BASES:
        return BASES[family]
    from lt_train.hybrid.loading import prove_auto_family  # not above: the fast tier imports this file, and no models

    prove_auto_family(HELIUM)
    return HELIUM


WITH_LAYER_TYPES = ("qwen2", "qwen3", "llama", "mistral", "smollm3")
"""Families of which a stock class has a window in some layers."""


def over_families(spec: HybridSpec) -> pytest.MarkDecorator:
    """`base_config` and `spec` of a test: every family by layers, as in `spec`, and CORE by KV heads."""
    cases = [pytest.param(family, spec, id=f"{family}-layers") for family in FAMILIES]
    cases += [pytest.param(family, SPLIT, id=f"{family}-KV heads") for family in CORE]
    return pytest.mark.parametrize(("base_config", "spec"), cases, indirect=["base_config"])


def attention_linears(model: nn.Module) -> list[str]:
    """The names of the linear modules of a layer's attention: q_proj and so on, or the fused qkv_proj."""
    return [name for name, module in model.model.layers[0].self_attn.named_children() if isinstance(module, nn.Linear)]


SPLIT = HybridSpec.from_streaming_heads([(1,), (), (0,), (0, 1)], SIZES["num_key_value_heads"], w_sink=3, w_recent=7)
"""A hybrid of any of these families, with layers of which one KV head streams."""


def on_base(config: PreTrainedConfig, spec: HybridSpec) -> HybridSpec:
    """`spec` on a base: its sliding layers slide, and stream in nothing."""
    base = base_spec(config.to_dict())
    return replace(
        spec,
        lazy_layers=tuple(layer for layer in spec.lazy_layers if layer in base.full_in_base),
        split_layers=tuple((layer, heads) for layer, heads in spec.split_layers if layer in base.full_in_base),
        sliding_layers=base.sliding_layers,
        sliding_window=base.sliding_window,
    )
