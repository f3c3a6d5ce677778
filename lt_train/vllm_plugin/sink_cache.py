"""The KV cache of streaming layers with sink tokens, in vLLM's block manager: a sliding window whose first blocks are never freed.

Registered when this module is imported, which every process does that is given a `SinkTokensSpec`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any, Self

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkTokensSpec(SlidingWindowSpec):
    """A sliding window, and the first `w_sink` tokens of a request."""

    w_sink: int

    @classmethod
    def of(cls, window: SlidingWindowSpec, w_sink: int) -> Self:
        return cls(**{field.name: getattr(window, field.name) for field in fields(window)}, w_sink=w_sink)

    @property
    def sink_blocks(self) -> int:
        return ceil(self.w_sink / self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + self.sink_blocks


class SinkTokensManager(SlidingWindowManager):
    """Of a request whose window has left its sinks behind, the block table is: sink blocks, null blocks, the window's blocks."""

    def __init__(self, kv_cache_spec: SinkTokensSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *further: Any,
        **settings: Any,
    ) -> int:
        """As of a window; and the sink blocks of a prefix that is cached, where they are taken from those that could be evicted."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *further, **settings
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return needed + self._get_num_evictable_blocks(new_computed_blocks[: min(skipped, self.sink_blocks)])

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """
        Raises:
            ValueError: tokens that a KV connector computed elsewhere: it transfers a window without the sinks.
        """
        if num_external_computed_tokens:
            raise ValueError("kv_transfer_config: the KV cache of sink tokens cannot be transferred. Fix: remove the KV connector")
        super().add_local_computed_blocks(request_id, new_computed_blocks, num_local_computed_tokens, 0)
        skipped = self.get_num_skipped_tokens(num_local_computed_tokens) // self.block_size
        sinks = new_computed_blocks[: min(skipped, self.sink_blocks)]
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As of a window, if the sink blocks are cached too; nothing otherwise."""
        assert isinstance(kv_cache_spec, SinkTokensSpec)
        found, tokens = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for index in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in found), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[index] = block
        return found, tokens


KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers vLLM's own, which it does not once there is another
KVCacheSpecRegistry.register(SinkTokensSpec, SinkTokensManager, uniform_type_base_spec=SinkTokensSpec)
