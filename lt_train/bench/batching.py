"""What continuous batching is worth: the engine against `generate()` with static batches, in one run.

The same hybrid, the same memory, answers of mixed lengths.

The lengths are given, so that both do the same work: request i ends after its own number of tokens, whatever they say. A static
batch goes on until its longest row ends, and must have room for rows as long as the longest of all.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import kv_sizes
from lt_train.inference.loading import load_base_config, load_for_inference, load_tokenizer
from lt_train.inference.requests import Request, Sampling
from lt_train.recipe.schema import Model
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress
from lt_train.selection.choose import evenly_spread_layers

PROMPT_TOKENS = 64
SHORTEST_FRACTION = 1 / 16
"""The shortest answer by the longest; lengths between are spread evenly over their logarithms, as lengths of traces about are."""


@dataclass(frozen=True)
class Workload:
    requests: tuple[Request, ...]
    """Each with its own `max_new_tokens`."""

    @property
    def tokens(self) -> int:
        return sum(request.max_new_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        return PROMPT_TOKENS + max(request.max_new_tokens for request in self.requests)


def mixed_lengths(count: int, longest: int, vocabulary: int, seed: int = 0) -> Workload:
    """`count` random prompts; answers from a sixteenth of `longest` tokens to all of them."""
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = tuple(draw.randrange(vocabulary) for _ in range(PROMPT_TOKENS))
        tokens = round(longest * SHORTEST_FRACTION ** draw.random())
        requests.append(Request(str(number), 0, 0, prompt, max_new_tokens=tokens))
    return Workload(tuple(requests))


def time_engine(engine: Engine, work: Workload) -> float:
    """Seconds for all answers."""
    started = time.perf_counter()
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=work.longest - PROMPT_TOKENS)
    with show_progress("engine", total=len(work.requests)) as bar:
        for answer in engine.answers(work.requests, greedy):
            assert answer.tokens == answer.request.max_new_tokens
            bar.advance()
    return time.perf_counter() - started


class EndsAt(StoppingCriteria):
    """Row b is done after lengths[b] new tokens."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.length_B = torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] - PROMPT_TOKENS >= self.length_B


@torch.inference_mode()
def time_static_batches(model: HybridForCausalLM, work: Workload, batch_size: int) -> float:
    """Seconds for all answers, `batch_size` rows at a time in the order they came."""
    started = time.perf_counter()
    with show_progress("static batches", total=len(work.requests)) as bar:
        for start in range(0, len(work.requests), batch_size):
            batch = work.requests[start : start + batch_size]
            lengths = [request.max_new_tokens for request in batch]
            ids_BP = torch.tensor([request.prompt_ids for request in batch], device=model.device)
            config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None)
            ends = StoppingCriteriaList([EndsAt(lengths, model.device)])
            model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=config, stopping_criteria=ends)
            bar.update(start + len(batch))
    return time.perf_counter() - started


def bench_batching(
    model: Model, ratio: float, w_sink: int, w_recent: int, count: int, longest: int, budget: int, console: Console
) -> None:
    """Print both rates.

    Raises:
        UserError: no such model, a ratio that leaves no layer or takes all, or a budget below one sequence.
    """
    config, tokenizer = load_base_config(model), load_tokenizer(model)
    lazy = evenly_spread_layers(ratio, config.num_hidden_layers)
    spec = HybridSpec(config.num_hidden_layers, lazy, w_sink, w_recent)
    hybrid = load_for_inference(model, spec, compute_dtype(model.dtype))
    hybrid.generation_config = GenerationConfig(eos_token_id=None)
    work = mixed_lengths(count, longest, config.vocab_size)
    needed = kv_sizes(hybrid).sequence(work.longest)
    if budget < needed:
        raise UserError(f"--kv-budget: {budget:,} bytes hold no sequence of {work.longest:,} tokens, which takes {needed:,}")
    rows = min(budget // needed, count)
    engine = Engine(hybrid, tokenizer, kv_budget=budget, max_slots=count)
    engine.stop_ids = ()  # lengths are given
    seconds = {"engine": time_engine(engine, work), "static": time_static_batches(hybrid, work, rows)}
    engine_rate, static_rate = work.tokens / seconds["engine"], work.tokens / seconds["static"]
    console.print(
        f"{model.base}, {len(lazy)} of {spec.num_layers} layers stream, {hybrid.device.type}, {torch.get_num_threads()} threads; "
        f"{count} answers of {min(r.max_new_tokens for r in work.requests):,} to {work.longest - PROMPT_TOKENS:,} tokens, "
        f"{work.tokens:,} in all; KV budget {budget / 2**20:,.0f} MiB for each\n"
        f"engine          {engine_rate:8,.1f} tokens/s, {engine.lay_out(count, work.longest).slots} slots\n"
        f"static batches  {static_rate:8,.1f} tokens/s, {rows} rows of up to {work.longest:,} tokens\n"
        f"faster by       {engine_rate / static_rate:8.2f}x",
        highlight=False,
        soft_wrap=True,
    )
