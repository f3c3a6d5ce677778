"""The decoding speed of vLLM, in vLLM's own environment: python -m lt_train.vllm_plugin.decode_speed ORDER.json RESULT.json

ORDER: {"model": folder, "dtype": "float32", "kv_bytes": N, "steps": N, "prompts": [[[token id, ...], ...], ...]}, a list of prompts
for each measurement. RESULT: for each [sequences, seconds]: as many of its prompts as the cache holds, and the time of a step.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any


def main(order: Path, result: Path) -> None:
    from vllm import LLM

    settings = json.loads(order.read_text(encoding="utf-8"))
    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        kv_cache_memory_bytes=settings["kv_bytes"],
        max_model_len=max(len(prompt) for prompts in settings["prompts"] for prompt in prompts) + settings["steps"] + 1,
        max_num_seqs=max(len(prompts) for prompts in settings["prompts"]),
        enable_prefix_caching=True,
        enforce_eager=True,  # the CPU build computes operators of its own either way
    )
    found = []
    for prompts in settings["prompts"]:
        held = prompts[: _room(llm, len(prompts[0]) + settings["steps"] + 1)]
        found.append([len(held), _seconds_of_step(llm, held, settings["steps"]) if held else 0.0])
    result.write_text(json.dumps(found), encoding="utf-8")


def _room(llm: Any, tokens: int) -> int:
    """The number of sequences of `tokens` tokens that the KV cache holds: in complete blocks, of which one stays empty."""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks - 1) // -(-tokens // cache.block_size)


def _seconds_of_step(llm: Any, prompts: list[list[int]], steps: int) -> float:
    """The median over the steps that give every sequence a token, by when they end. The prompts are cached before: read by and by,
    the first sequence would end before the last one begins.

    Raises:
        RuntimeError: the sequences never ran together.
    """
    from vllm import SamplingParams

    def greedy(tokens: int) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)

    engine, requests = llm.llm_engine, [{"prompt_token_ids": prompt} for prompt in prompts]
    llm.generate(requests, greedy(1), use_tqdm=False)
    for number, request in enumerate(requests):
        engine.add_request(str(number), request, greedy(steps + 1))
    ends: list[float] = []
    while engine.has_unfinished_requests():
        if len(engine.step()) == len(prompts):
            ends.append(time.perf_counter())
    if len(ends) < 2:
        raise RuntimeError(f"{len(prompts)} sequences of {len(prompts[0]):,} tokens never ran together")
    return median(end - start for start, end in pairwise(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
