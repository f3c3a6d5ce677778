"""Run by vLLM's python: its KV cache manager with our manager of sink blocks, on requests that share prefixes, in too few blocks.

A request's tokens stand in the slots that it was given, each with all tokens before it; every query must find what it sees there.
"""

import random

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.vllm_plugin.sink_cache import SinkTokensManager, SinkTokensSpec

BLOCK, CHUNK, LONGEST = 4, 8, 80
SHAPE = dict(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)


class Cache:
    """The manager, and what is written where: (group, block, place in it) -> the tokens up to this one."""

    def __init__(self, w_sink: int, w_recent: int, blocks: int, *, full: bool) -> None:
        self.w_sink, self.w_recent = w_sink, w_recent
        spec = SinkTokensSpec(**SHAPE, sliding_window=w_recent, w_sink=w_sink)
        self.specs = [*([FullAttentionSpec(**SHAPE)] if full else []), spec]
        groups = [KVCacheGroupSpec([f"layer.{number}"], each) for number, each in enumerate(self.specs)]
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, LONGEST, BLOCK, BLOCK, max_in_flight_tokens=CHUNK)
        assert isinstance(self.manager.coordinator.single_type_managers[-1], SinkTokensManager)
        self.most = spec.max_admission_blocks_per_request(CHUNK, LONGEST)
        self.written: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.hits = self.preempted = 0

    def step(self, request: Request, tokens: int) -> bool:
        """Computes the next tokens of a request; False where there is no room."""
        cached, found = None, 0
        if request.num_computed_tokens == 0:
            cached, found, _ = self.manager.get_computed_blocks(request)
            tokens = min(tokens, request.num_tokens - found)
        if self.manager.allocate_slots(request, tokens, found, cached) is None:
            return False
        self.hits += found
        start = request.num_computed_tokens + found
        for group, table in enumerate(self.manager.get_block_ids(request.request_id)):
            self._write(group, table, request.all_token_ids, start, start + tokens)
            self._check(group, table, request.all_token_ids, start, start + tokens)
        request.num_computed_tokens = start + tokens
        return True

    def _write(self, group: int, table: list[int], tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            assert table[position // BLOCK], "a new token in the null block"
            self.written[group, table[position // BLOCK], position % BLOCK] = tuple(tokens[: position + 1])

    def _check(self, group: int, table: list[int], tokens: list[int], start: int, end: int) -> None:
        queries, keys = torch.arange(start, end)[:, None], torch.arange(end)
        streams = isinstance(self.specs[group], SinkTokensSpec)
        visible = streaming_visible(queries, keys, self.w_sink, self.w_recent) if streams else full_visible(queries, keys)
        for position in visible.any(0).nonzero().flatten().tolist():
            stored = self.written.get((group, table[position // BLOCK], position % BLOCK))
            assert stored == tuple(tokens[: position + 1]), f"position {position} of {end}: {stored}"
        assert not streams or sum(map(bool, table)) <= self.most, "more blocks than a request may hold"


def serve(seed: int) -> tuple[int, int]:
    """Requests until 40 are done; those that find no room lose their blocks and start again, as vLLM preempts them."""
    rng = random.Random(seed)
    cache = Cache(rng.choice([1, 4, 6]), rng.choice([1, 5, 12]), rng.choice([24, 40, 60]), full=rng.random() < 0.7)
    hasher = get_request_block_hasher(BLOCK, sha256)
    prefixes = [[rng.randrange(50) for _ in range(40)] for _ in range(2)]
    running: list[Request] = []
    done = 0
    while done < 40:
        if len(running) < 4 and rng.random() < 0.4:
            prompt = [*rng.choice(prefixes)[: rng.randrange(1, 41)], *(rng.randrange(50) for _ in range(rng.randrange(1, 12)))]
            running.append(
                Request(f"{seed}-{done}-{rng.random()}", prompt, SamplingParams(max_tokens=20), None, block_hasher=hasher)
            )
        for request in list(running):
            left = request.num_tokens - request.num_computed_tokens
            if not cache.step(request, min(left, rng.randrange(1, CHUNK + 1))):
                cache.preempted += 1
                cache.manager.free(request)
                request.num_computed_tokens = 0
            elif request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(rng.randrange(50))
            if request.num_output_tokens == 20:
                cache.manager.free(request)
                running.remove(request)
                done += 1
    assert (
        cache.manager.block_pool.get_num_free_blocks()
        + sum(
            bool(block) for request in running for table in cache.manager.get_block_ids(request.request_id) for block in set(table)
        )
        >= cache.manager.block_pool.num_gpu_blocks - 1
    )
    return cache.hits, cache.preempted


if __name__ == "__main__":
    init_none_hash(sha256)
    counts = [serve(seed) for seed in range(3)]
    print(*(sum(column) for column in zip(*counts, strict=True)))
