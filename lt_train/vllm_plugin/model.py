"""Our exports as a model of vLLM: its Llama classes, with streaming attention.

One class for all families, because they differ from Llama in the attention alone: Qwen2 has biases, Qwen3 normalises queries and
keys. vLLM's KV cache manager frees what is outside a layer's window; its attention kernels, on CPUs and GPUs, know learned sinks;
sink tokens have a cache and kernels in `sink_attention`. Where single KV heads stream, a layer has several of vLLM's Attention
layers: its `units`. Exports without sinks, which are checkpoints of stock classes, are computed as well: see launch/serve-vllm.sh.

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
from vllm.platforms import current_platform

from lt_train.hybrid.configuration import HybridConfig
from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.checks import ANY_VERSION, Settings, check_served, check_settings, check_version
from lt_train.vllm_plugin.units import units_of_layer


class HybridForCausalLM(LlamaForCausalLM):
    """
    Raises:
        ValueError: another version of vLLM, an export that it does not compute, or settings with which it would not.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version(vllm.__version__, os.environ.get(ANY_VERSION))
        config = vllm_config.model_config.hf_config
        check_served(config)
        settings = Settings(
            platform="cpu" if current_platform.is_cpu() else "gpu" if current_platform.is_cuda_alike() else "other",
            tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
            kv_dtype=vllm_config.cache_config.cache_dtype,
            frees_outside_window=not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            transfers_kv=vllm_config.kv_transfer_config is not None,
            speculates=vllm_config.speculative_config is not None,
        )
        check_settings(spec_of(config), settings)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=HybridDecoderLayer)


def spec_of(config: PreTrainedConfig) -> HybridSpec:
    """The spec of an export with code of its own, or of one of a stock class."""
    if isinstance(config, HybridConfig):
        return config.spec
    return HybridSpec.from_layer_types(config.layer_types, 0, config.sliding_window)


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

        spec, layer = spec_of(config), extract_layer_index(prefix)
        units = units_of_layer(spec, layer, num_kv_heads)
        self.unit_groups = len(units[0].heads) if len(units) > 1 else self.groups
        sinks: dict[str, Tensor] = {}
        if spec.learned_sinks and spec.is_lazy(layer):
            self.sinks = ShardedSinks(self.heads)
            sinks["sinks"] = self.sinks.weight
        self.units = nn.ModuleList(
            attention_layer(
                spec,
                streams=unit.streams,
                num_heads=self.unit_groups * (self.heads // self.groups),
                num_kv_heads=self.unit_groups,
                head_size=self.head_size,
                cache_config=cache_config,
                quant_config=quant_config,
                attn_type=attn_type,
                prefix=f"{prefix}.attn_{index}",
                **sinks,
            )
            for index, unit in enumerate(units)
        )
        order_G = torch.tensor([head for unit in units for head in unit.heads])
        self.register_buffer("order_G", order_G, persistent=False)
        self.register_buffer("place_G", order_G.argsort(), persistent=False)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions [N], hidden_states [N, hidden size] -> [N, hidden size]"""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([size * self.head_size for size in (self.heads, self.groups, self.groups)], dim=-1)
        if self.norms:
            q = self.q_norm(q.unflatten(-1, (self.heads, self.head_size))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.groups, self.head_size))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.units[0](q, k, v) if len(self.units) == 1 else self._by_units(q, k, v))
        return output

    def _by_units(self, *qkv: Tensor) -> Tensor:
        """[N, heads x D] each -> [N, H x D], of heads in the order of the projection."""
        parts = (x.unflatten(-1, (self.groups, -1))[:, self.order_G].split(self.unit_groups, dim=1) for x in qkv)
        attended = [unit(*(x.flatten(1) for x in of_unit)) for unit, *of_unit in zip(self.units, *parts, strict=True)]
        return torch.cat(attended, dim=-1).unflatten(-1, (self.groups, -1))[:, self.place_G].flatten(1)


def attention_layer(spec: HybridSpec, *, streams: bool, num_heads: int, head_size: int, **settings: Any) -> Attention:
    """The Attention layer of vLLM for heads that stream, or that do not."""
    if not streams:
        return Attention(num_heads, head_size, head_size**-0.5, **settings)
    settings["per_layer_sliding_window"] = spec.w_recent
    if not spec.w_sink:
        return Attention(num_heads, head_size, head_size**-0.5, **settings)
    from lt_train.vllm_plugin.sink_attention import SinkTokensAttention

    return SinkTokensAttention(num_heads, head_size, head_size**-0.5, w_sink=spec.w_sink, **settings)


class ShardedSinks(nn.Module):
    """The sink logits of this process's query heads; tensor parallelism divides heads in their order."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]  # vLLM's hook by which a parameter loads itself

    def _load(self, parameter: nn.Parameter, loaded_H: Tensor) -> None:
        heads = parameter.shape[0]
        parameter.data.copy_(loaded_H.narrow(0, get_tensor_model_parallel_rank() * heads, heads))
