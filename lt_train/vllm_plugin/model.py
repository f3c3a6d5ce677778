"""Our exports as a model of vLLM: its Llama classes, with a window and learned sinks in the streaming layers.

One class for all families, because they differ from Llama in the attention alone: Qwen2 has biases, Qwen3 normalises queries and
keys. vLLM's KV cache manager frees what lies outside a layer's window; its attention kernels, on CPUs and GPUs, know learned sinks.
Exports without sinks, which are checkpoints of stock classes, are computed as well: see launch/serve-vllm.sh.

Shapes: N tokens of a batch, H query heads and G key/value heads of this process, D head size.
"""

import os
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from lt_train.hybrid.spec import STREAMING
from lt_train.vllm_plugin.checks import ANY_VERSION, check_served, check_version


class HybridForCausalLM(LlamaForCausalLM):
    """
    Raises:
        ValueError: another version of vLLM, or sinks that no kernel of it computes.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version(vllm.__version__, os.environ.get(ANY_VERSION))
        check_served(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=HybridDecoderLayer)


class HybridDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=HybridAttention)


class HybridAttention(nn.Module):
    """The attention of one layer; the arguments are those that LlamaDecoderLayer gives."""

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: Any,
        bias: bool,
        bias_o_proj: bool,
        cache_config: Any,
        prefix: str,
        attn_type: str,
    ) -> None:
        super().__init__()
        processes = get_tensor_model_parallel_world_size()
        self.head_size = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.heads, self.groups = num_heads // processes, max(1, num_kv_heads // processes)
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            self.head_size,
            num_heads,
            num_kv_heads,
            bias=bias or config.model_type.endswith("qwen2"),
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_size, hidden_size, bias=bias_o_proj, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.norms = config.model_type.endswith("qwen3")
        if self.norms:
            self.q_norm = RMSNorm(self.head_size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_size, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(self.head_size, max_position=max_position_embeddings, rope_parameters=config.rope_parameters)
        streams = config.layer_types[extract_layer_index(prefix)] == STREAMING
        sinks: dict[str, Tensor] = {}
        if streams and getattr(config, "learned_sinks", False):
            self.sinks = ShardedSinks(self.heads)
            sinks["sinks"] = self.sinks.weight
        self.attn = Attention(
            self.heads,
            self.head_size,
            self.head_size**-0.5,
            num_kv_heads=self.groups,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if streams else None,
            attn_type=attn_type,
            prefix=f"{prefix}.attn",
            **sinks,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions [N], hidden_states [N, hidden size] -> [N, hidden size]"""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([size * self.head_size for size in (self.heads, self.groups, self.groups)], dim=-1)
        if self.norms:
            q = self.q_norm(q.unflatten(-1, (self.heads, self.head_size))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.groups, self.head_size))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class ShardedSinks(nn.Module):
    """The sink logits of this process's query heads; tensor parallelism divides heads in their order."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]  # how vLLM asks a parameter to load itself

    def _load(self, parameter: nn.Parameter, loaded_H: Tensor) -> None:
        heads = parameter.shape[0]
        parameter.data.copy_(loaded_H.narrow(0, get_tensor_model_parallel_rank() * heads, heads))
