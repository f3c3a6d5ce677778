"""Run by vLLM's python: greedy answers of exports: python answers.py ORDER.json RESULT.json

ORDER: {"exports": {name: folder}, "prompts": {name: [[token id, ...], ...]}, "again": M, "max_tokens": N}
RESULT: {name: two lists with [token ids, their log-probabilities] for each prompt, the second from cached prefixes, for M prompts}

Prompts are read in chunks smaller than they are, and answers share what their prompts have in common.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from lt_train.vllm_plugin.command import server_command


def engine(folder: str) -> LLM:
    """With the class that `lt-train serve --vllm` names."""
    gc.freeze()  # again: an engine that ends undoes it
    command = server_command(Path(folder), [])
    overrides = json.loads(command[command.index("--hf-overrides") + 1]) if "--hf-overrides" in command else None
    chunked = dict(max_num_batched_tokens=32, max_num_seqs=16, enable_chunked_prefill=True, enable_prefix_caching=True)
    sizes = dict(dtype="float32", max_model_len=2048, block_size=32, kv_cache_memory_bytes=2**26)
    return LLM(model=folder, hf_overrides=overrides, enforce_eager=True, **chunked, **sizes)


def answers(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[tuple[list[int], list[float]]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    written = [one.outputs[0] for one in found]
    return [
        (list(one.token_ids), [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in written
    ]


def main(order: Path, result: Path) -> None:
    requested = json.loads(order.read_text())
    found = {}
    for name, folder in requested["exports"].items():
        llm = engine(folder)
        prompts = requested["prompts"][name]
        found[name] = [answers(llm, each, requested["max_tokens"]) for each in (prompts, prompts[: requested["again"]])]
        del llm  # its cache makes room for the next one's
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
