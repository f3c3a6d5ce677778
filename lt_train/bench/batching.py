"""The gain of continuous batching: the engine against `generate()` with static batches, in one run.

Both use the same hybrid and the same memory, for answers of mixed lengths.

The lengths are fixed, so that both do the same work: request i ends after its own number of tokens, no matter which. A static
batch runs until its longest row ends, and needs memory for rows as long as the longest answer of all.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lt_train.bench.base import Base, hybrid_spec, of_full_layers
from lt_train.bench.decode import budget_too_small
from lt_train.bench.printing import print_lines
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import kv_sizes
from lt_train.inference.requests import Request, Sampling
from lt_train.runtime.devices import device_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress

PROMPT_TOKENS = 64
SHORTEST_FRACTION = 1 / 16
"""Length of the shortest answer by that of the longest; lengths are uniform in their logarithm, roughly as those of traces."""


@dataclass(frozen=True)
class MixedAnswers:
    requests: tuple[Request, ...]
    """Each with its own `max_new_tokens`."""
    answer_tokens: tuple[int, ...]
    """Tokens of each answer."""

    @property
    def tokens(self) -> int:
        return sum(self.answer_tokens)

    @property
    def longest(self) -> int:
        return PROMPT_TOKENS + max(self.answer_tokens)


def mixed_lengths(count: int, longest: int, vocab_size: int, seed: int = 0) -> MixedAnswers:
    """`count` random prompts; answers of a sixteenth of `longest` tokens up to `longest`."""
    rng = random.Random(seed)
    requests, lengths = [], []
    for number in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS))
        lengths.append(round(longest * SHORTEST_FRACTION ** rng.random()))
        requests.append(Request(str(number), 0, 0, prompt, max_new_tokens=lengths[-1]))
    return MixedAnswers(tuple(requests), tuple(lengths))


def time_engine(engine: Engine, work: MixedAnswers) -> float:
    """Seconds for all answers."""
    started = time.perf_counter()
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=work.longest - PROMPT_TOKENS)
    with show_progress("engine", total=len(work.requests)) as bar:
        for answer in engine.answers(work.requests, greedy):
            assert answer.tokens == answer.request.max_new_tokens
            bar.advance()
    return time.perf_counter() - started


class EndsAt(StoppingCriteria):
    """Row b ends after lengths[b] new tokens."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.length_B = torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - PROMPT_TOKENS >= self.length_B


@torch.inference_mode()
def time_static_batches(model: HybridForCausalLM, work: MixedAnswers, batch_size: int) -> float:
    """Seconds for all answers, `batch_size` rows at a time in the order of the requests."""
    started = time.perf_counter()
    with show_progress("static batches", total=len(work.requests)) as bar:
        for start in range(0, len(work.requests), batch_size):
            batch = work.requests[start : start + batch_size]
            lengths = work.answer_tokens[start : start + batch_size]
            ids_BP = torch.tensor([request.prompt_ids for request in batch], device=model.device)
            config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None)
            ends = StoppingCriteriaList([EndsAt(lengths, model.device)])
            model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=config, stopping_criteria=ends)
            bar.update(start + len(batch))
    return time.perf_counter() - started


def bench_batching(
    base: Base, ratio: float, w_sink: int, w_recent: int, count: int, longest: int, budget: int, console: Console
) -> None:
    """Print both rates.

    Raises:
        UserError: there is no such model, no layer or every layer would stream, or the budget is below one sequence.
    """
    config, tokenizer = base.config(), base.tokenizer()
    spec = hybrid_spec(config, ratio, w_sink, w_recent)
    hybrid = base.for_inference(spec)
    hybrid.generation_config = GenerationConfig(eos_token_id=None)
    work = mixed_lengths(count, longest, config.vocab_size)
    needed = kv_sizes(hybrid).sequence(work.longest)
    if budget < needed:
        raise UserError(budget_too_small(budget, work.longest, needed))
    rows = min(budget // needed, count)
    engine = Engine(hybrid, tokenizer, kv_budget=budget, max_slots=count)
    engine.stop_ids = ()  # lengths are given
    seconds = {"engine": time_engine(engine, work), "static": time_static_batches(hybrid, work, rows)}
    engine_rate, static_rate = work.tokens / seconds["engine"], work.tokens / seconds["static"]
    print_lines(
        console,
        f"{base.name}, {of_full_layers(spec)} stream, {device_name(hybrid.device)}; "
        f"{count} answers of {min(work.answer_tokens):,} to {work.longest - PROMPT_TOKENS:,} tokens, "
        f"{work.tokens:,} in all; KV budget {budget / 2**20:,.0f} MiB for each\n"
        f"engine          {engine_rate:8,.1f} tokens/s, {engine.lay_out(count, work.longest).slots} slots\n"
        f"static batches  {static_rate:8,.1f} tokens/s, {rows} rows of up to {work.longest:,} tokens\n"
        f"faster by       {engine_rate / static_rate:8.2f}x",
    )
