"""The decoding speed of vLLM, in vLLM's own environment: python -m lt_train.vllm_plugin.decode_speed ORDER.json RESULT.json

ORDER: {"model": folder, "dtype": "float32", "kv_bytes": N, "steps": N, "prompts": [[[token id, ...], ...], ...]}, a list of prompts
for each measurement. RESULT: the seconds of a step for each, with all of its prompts running.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(order: Path, result: Path) -> None:
    from vllm import LLM

    asked = json.loads(order.read_text(encoding="utf-8"))
    llm = LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        kv_cache_memory_bytes=asked["kv_bytes"],
        max_model_len=max(len(prompt) for prompts in asked["prompts"] for prompt in prompts) + asked["steps"] + 1,
        max_num_seqs=max(len(prompts) for prompts in asked["prompts"]),
        enable_prefix_caching=True,
        enforce_eager=True,  # the CPU build computes operators of its own either way
    )
    seconds = [_seconds_of_step(llm, prompts, asked["steps"]) for prompts in asked["prompts"]]
    result.write_text(json.dumps(seconds), encoding="utf-8")


def _seconds_of_step(llm: Any, prompts: list[list[int]], steps: int) -> float:
    """By two runs whose prompts are cached, which differ by `steps` tokens of each sequence."""
    _seconds(llm, prompts, 1)
    one, all_steps = _seconds(llm, prompts, 1), _seconds(llm, prompts, steps + 1)
    return (all_steps - one) / steps


def _seconds(llm: Any, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
