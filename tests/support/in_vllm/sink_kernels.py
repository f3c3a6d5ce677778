"""Run by vLLM's python: our attention with sink tokens against the predicate of mask.py, on a CPU, on a GPU and in Triton's
interpreter.

Usage: python sink_kernels.py cpu|gpu FOLDER_OF_A_MODEL, python in_interpreter.py sink_kernels.py gpu FOLDER_OF_A_MODEL
"""

import os
import sys
from itertools import product
from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata

from lt_train.hybrid.mask import streaming_visible
from lt_train.vllm_plugin.sink_cache import SinkTokensSpec

PLATFORM, MODEL = sys.argv[1:]
IN_INTERPRETER = PLATFORM == "gpu" and os.environ.get("TRITON_INTERPRET") == "1"
torch.set_default_device("cuda" if PLATFORM == "gpu" and not IN_INTERPRETER else "cpu")
HEADS, GROUPS, SIZE, BLOCK = 4, 2, 32, 32
LENGTHS = ((1, 1), (1, 150), (1, 40), (1, 64)), ((37, 37), (1, 133), (20, 180), (3, 64))
"""Batches of (queries, tokens with these): four that decode, and some that read a prompt from its start or go on with it."""
SHORT = ((1, 1), (1, 135), (1, 40)), ((37, 37), (3, 135))
CASES = list(product((4, 33), (7,), SHORT) if IN_INTERPRETER else product((1, 4, 33), (1, 7, 64), LENGTHS))
"""(w_sink, w_recent, batch); few and short ones for the interpreter, which is slow."""


def visible_blocks(queries: int, length: int, w_sink: int, w_recent: int) -> set[int]:
    seen = streaming_visible(torch.arange(length - queries, length)[:, None], torch.arange(length), w_sink, w_recent).any(0)
    return {int(position) // BLOCK for position in seen.nonzero()}


def check(backend: type, config: object, w_sink: int, w_recent: int, batch: tuple[tuple[int, int], ...]) -> float:
    """The largest difference from attention by the mask. Blocks that no query sees are as the manager leaves them: freed."""
    spec = SinkTokensSpec(
        block_size=BLOCK, num_kv_heads=GROUPS, head_size=SIZE, dtype=torch.float32, sliding_window=w_recent, w_sink=w_sink
    )
    starts = torch.tensor([0, *torch.tensor([queries for queries, _ in batch]).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in batch], dtype=torch.int32)
    most = max(-(-length // BLOCK) for _, length in batch)
    table = torch.zeros(len(batch), most, dtype=torch.int32)  # 0: the null block
    cache = torch.randn(1 + table.numel(), GROUPS, BLOCK, 2 * SIZE) * 3  # what others wrote
    free = torch.randperm(table.numel()).add(1).tolist()
    slots, tokens = [], []
    for row, (queries, length) in enumerate(batch):
        seen = visible_blocks(queries, length, w_sink, w_recent) | {p // BLOCK for p in range(length - queries, length)}
        for block in seen:
            table[row, block] = free.pop()
        q, k, v = torch.randn(queries, HEADS, SIZE), torch.randn(length, GROUPS, SIZE), torch.randn(length, GROUPS, SIZE)
        tokens.append((q, k, v))
        slots.append(torch.tensor([int(table[row, p // BLOCK]) * BLOCK + p % BLOCK for p in range(length)]))
    impl = backend.get_impl_cls()(HEADS, SIZE, SIZE**-0.5, GROUPS, None, w_recent, "auto")
    layer = SimpleNamespace(
        isa="vec", _k_scale_float=1.0, _v_scale_float=1.0, _q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1)
    )
    written = torch.cat([k for _, k, _ in tokens]), torch.cat([v for *_, v in tokens])
    write(impl, layer, *written, cache, torch.cat(slots))
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=lengths,
        num_reqs=len(batch),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(queries for queries, _ in batch),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.cat([slot[-queries:] for slot, (queries, _) in zip(slots, batch, strict=True)]),
    )
    metadata = backend.get_builder_cls()(spec, [], config, starts.device).build(0, common)
    query = torch.cat([q for q, *_ in tokens])
    output = torch.full_like(query, torch.nan)
    impl.forward(layer, query, query, query, cache, metadata, output)
    return max(
        float((output[start:end] - by_mask(*qkv, w_sink, w_recent)).abs().max())
        for start, end, qkv in zip(starts, starts[1:], tokens, strict=False)
    )


def write(impl: object, layer: object, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Keys and values into their slots; those of freed blocks go nowhere."""
    kept = slots >= BLOCK
    if PLATFORM == "cpu":
        impl.do_kv_cache_update(layer, k, v, cache, torch.where(kept, slots, -1))
    else:  # its Triton kernel writes what torch writes here
        cache[slots[kept] // BLOCK, :, slots[kept] % BLOCK] = torch.cat([k[kept], v[kept]], dim=-1)


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w_sink: int, w_recent: int) -> torch.Tensor:
    queries, length = len(q), len(k)
    visible = streaming_visible(torch.arange(length - queries, length)[:, None], torch.arange(length), w_sink, w_recent)
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def main() -> None:
    if PLATFORM == "cpu":
        from lt_train.vllm_plugin.sink_attention_cpu import SinkAttentionBackend as backend
    else:
        from lt_train.vllm_plugin.sink_attention_gpu import SinkAttentionGPUBackend as backend
    config = EngineArgs(model=MODEL, dtype="float32", max_num_seqs=8, skip_tokenizer_init=True).create_engine_config()
    torch.manual_seed(0)
    with set_current_vllm_config(config):
        print(len(CASES), max(check(backend, config, *case) for case in CASES))


if __name__ == "__main__":
    main()
