"""Attention with sink tokens in vLLM on a CPU, by torch: vLLM's kernel there knows a window, and no tokens outside of it.

A query's keys are gathered by the block table: the sinks, and those of the window. `sink_cache` keeps the sinks' blocks.

Shapes: N tokens of a batch, H query heads and G key/value heads of this layer, Q queries and K keys of one sequence, D head size,
B blocks of S tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from lt_train.hybrid.mask import streaming_visible
from lt_train.vllm_plugin.sink_cache import SinkTokensSpec


@dataclass(frozen=True)
class Sequence:
    """The queries of one sequence in a batch, and the places of their keys in the cache."""

    queries: slice
    blocks_K: Tensor
    offsets_K: Tensor
    visible_QK: Tensor


@dataclass
class SinkAttentionMetadata(CPUAttentionMetadata):
    block_size: int = 0
    sequences: tuple[Sequence, ...] = ()


class SinkAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SinkAttentionMetadata:
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        spec = self.kv_cache_spec
        assert isinstance(spec, SinkTokensSpec)
        starts, lengths = built.query_start_loc.tolist(), built.seq_lens.tolist()
        sequences = tuple(
            sequence_of(slice(start, end), length, table, spec.block_size, spec.w_sink, spec.sliding_window)
            for start, end, length, table in zip(starts, starts[1:], lengths, built.block_table, strict=False)
            if end > start
        )
        return SinkAttentionMetadata(**vars(built), block_size=spec.block_size, sequences=sequences)


def sequence_of(queries: slice, length: int, block_table: Tensor, block_size: int, w_sink: int, w_recent: int) -> Sequence:
    """
    Args:
        queries: rows of the batch, the last tokens of the sequence. length: its tokens, with these.
        block_table: its blocks in the cache, in the order of its tokens.
    """
    q_positions = torch.arange(length - (queries.stop - queries.start), length)
    window = max(0, int(q_positions[0]) - w_recent + 1)
    k_positions = torch.cat([torch.arange(min(w_sink, window)), torch.arange(window, length)])
    return Sequence(
        queries,
        block_table[k_positions // block_size].long(),
        k_positions % block_size,
        streaming_visible(q_positions[:, None], k_positions, w_sink, w_recent),
    )


class SinkAttention(CPUAttentionBackendImpl):
    """Its cache [B, G, S, 2 D] holds keys and values side by side; that of vLLM's kernel depends on the processor."""

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """key, value [N, G, D]; slot_mapping [N]: block x S + token in it, below 0 for padding."""
        tokens = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[tokens]
        block_size = kv_cache.shape[2]
        kv_cache[slots // block_size, :, slots % block_size] = torch.cat([key[tokens], value[tokens]], dim=-1)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [N, H, D]. The new tokens are in the cache already."""
        if attn_metadata is None:  # a run that measures memory
            return output
        assert isinstance(attn_metadata, SinkAttentionMetadata) and attn_metadata.block_size == kv_cache.shape[2]
        assert output_scale is None and output_block_scale is None
        for sequence in attn_metadata.sequences:
            keys_values_KGC = kv_cache[sequence.blocks_K, :, sequence.offsets_K]
            key_GKD, value_GKD = keys_values_KGC.transpose(0, 1).chunk(2, dim=-1)
            q_HQD = query[sequence.queries].transpose(0, 1)
            attended_HQD = scaled_dot_product_attention(
                q_HQD[None],
                key_GKD[None],
                value_GKD[None],
                attn_mask=sequence.visible_QK,
                scale=self.scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )[0]
            output[sequence.queries] = attended_HQD.transpose(0, 1)
        return output


class SinkAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SinkAttention]:
        return SinkAttention

    @staticmethod
    def get_builder_cls() -> type[SinkAttentionMetadataBuilder]:
        return SinkAttentionMetadataBuilder
