"""Trainings of tiny mixtures of experts and other families, alone or in the processes of one launch."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, Qwen3MoeConfig

from lt_train.hybrid.loading import load_hybrid, prove_auto_family
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.processes import leave, this_process
from lt_train.runtime.tracking import NoTracker
from tests.support.families import on_base
from tests.support.tiny_training import EOS, PAD, SPEC, VOCABULARY, train_in
from tests.support.toy_family import ToyConfig, toy_config


def routed_by_rank() -> ToyConfig:
    """All tokens of a process go to the expert of its rank, and each expert is a module."""
    return toy_config(vocab_size=VOCABULARY, experts=2)


def qwen3_moe(**changed: Any) -> Qwen3MoeConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen3MoeConfig(**sizes | changed)


def train_experts(out: Path, base: Path, settings: dict[str, Any], config: PreTrainedConfig | None = None) -> None:
    """
    Args:
        config: of a base whose family is not declared.
    """
    torch.set_num_threads(1)
    if config is not None:
        prove_auto_family(config)

    spec = on_base(AutoConfig.from_pretrained(base), SPEC)

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        return load_hybrid(base, spec, dtype=dtype)

    train_in(out, settings, NoTracker(), load=load, spec=spec)
    if this_process().launched:
        leave(0)
