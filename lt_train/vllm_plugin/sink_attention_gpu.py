"""Attention with sink tokens in vLLM on a GPU, by its Triton kernel for R-SWA (reference sliding window attention).

There a query sees the first tokens of its sequence, as many as `rswa_prefix_lens`, and the latest `rswa_window`. vLLM sets the
former to each request's prompt; here they are `w_sink`. Never run on a GPU: the tests run the kernel in Triton's interpreter.
"""

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from lt_train.vllm_plugin.sink_cache import SinkTokensSpec


class SinkAttentionGPUMetadataBuilder(TritonAttentionMetadataBuilder):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        assert isinstance(self.kv_cache_spec, SinkTokensSpec)
        self.w_recent = self.kv_cache_spec.sliding_window
        most = self.vllm_config.scheduler_config.max_num_seqs
        self.prefix_lens = torch.full((most,), self.kv_cache_spec.w_sink, dtype=torch.int32, device=self.device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.rswa_prefix_lens = self.prefix_lens[: common_attn_metadata.num_reqs]
        metadata.rswa_window = self.w_recent
        return metadata


class SinkAttentionGPU(TritonAttentionImpl):
    """Without a window of its own: the kernel would skip the blocks before it, and with them the sinks."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sliding_window = (-1, -1)


class SinkAttentionGPUBackend(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SinkAttentionGPU]:
        return SinkAttentionGPU

    @staticmethod
    def get_builder_cls() -> type[SinkAttentionGPUMetadataBuilder]:
        return SinkAttentionGPUMetadataBuilder
