"""Run by vLLM's python: how many sequences vLLM itself says that its KV cache holds of hybrids.

Usage: python capacity.py FOLDER_OF_A_MODEL CASES.json, each [fields of a HybridSpec, KV heads, tokens, chunk, layer_tokens]
"""

import json
import sys
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.sink_cache import SinkTokensSpec
from lt_train.vllm_plugin.units import heads_of_a_unit, units_of_layer

BLOCK, SIZE = 128, 64


def attention_layers(spec: HybridSpec, kv_heads: int) -> dict[str, KVCacheSpec]:
    shape = dict(block_size=BLOCK, num_kv_heads=heads_of_a_unit(spec, kv_heads), head_size=SIZE, dtype=torch.float32)
    full, window = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=spec.w_recent)
    streaming = SinkTokensSpec.of(window, spec.w_sink) if spec.w_sink else window
    return {
        f"model.layers.{layer}.attn_{number}": streaming if unit.streams else full
        for layer in range(spec.num_layers)
        for number, unit in enumerate(units_of_layer(spec, layer, kv_heads))
    }


def sequences(config: VllmConfig, spec: HybridSpec, kv_heads: int, layer_tokens: int) -> float:
    groups = get_kv_cache_groups(config, attention_layers(spec, kv_heads))
    memory = layer_tokens * kv_heads * 2 * SIZE * torch.float32.itemsize
    return get_max_concurrency_for_kv_cache_config(config, get_kv_cache_config_from_groups(config, groups, memory))


def main(model: str, cases: Path) -> None:
    found = []
    for fields, kv_heads, tokens, chunk, layer_tokens in json.loads(cases.read_text()):
        settings = dict(max_model_len=tokens, max_num_batched_tokens=chunk, max_num_seqs=16, block_size=BLOCK)
        config = EngineArgs(model=model, dtype="float32", skip_tokenizer_init=True, **settings).create_engine_config()
        config.cache_config.kv_cache_layout = "LBHNC"
        found.append(sequences(config, HybridSpec(**fields), kv_heads, layer_tokens))
    print(*found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
