"""The Attention layer of vLLM for heads that stream with sink tokens."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from lt_train.vllm_plugin.sink_cache import SinkTokensSpec


class SinkTokensAttention(Attention):
    def __init__(self, *arguments: Any, w_sink: int, **settings: Any) -> None:
        super().__init__(*arguments, attn_backend=_backend(), **settings)
        self.w_sink = w_sink

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        window = super().get_kv_cache_spec(vllm_config)
        assert isinstance(window, SlidingWindowSpec)
        return SinkTokensSpec.of(window, self.w_sink)


def _backend() -> type[AttentionBackend]:
    if current_platform.is_cpu():
        from lt_train.vllm_plugin.sink_attention_cpu import SinkAttentionBackend

        return SinkAttentionBackend
    from lt_train.vllm_plugin.sink_attention_gpu import SinkAttentionGPUBackend

    return SinkAttentionGPUBackend
