"""Answers from a model: left-padded batches through its own `generate()`.

What a sample says does not depend on what shares its batch: its random numbers follow from (seed, problem, sample) and
are drawn one a token, so any order, batch size or interruption gives the same samples (up to floating-point noise of
the batched forward). Legend: B rows of a batch, P longest prompt, T new tokens, V vocabulary.
"""

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lt_train.errors import UserError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0: greedy, and top_p has no effect."""

    temperature: float
    top_p: float
    max_new_tokens: int

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One sample to draw. `seed` is the sample's own (`sample_seed`)."""

    problem: str
    sample: int
    seed: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What came for a request.

    token_ids: the new tokens, the stop token included where there is one. seconds: the batch's time divided by its
    rows.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: float


@dataclass(frozen=True)
class SpecialTokens:
    stop_ids: tuple[int, ...]
    pad_id: int

    def content(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens without the stop token at their end."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids


def generate(
    model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, tokens: SpecialTokens, batch_size: int
) -> Iterator[Generation]:
    """Answer every request, longest prompts first: rows of a batch are then of similar length, and too large a batch
    fails at once.

    Generations are yielded as their batch ends, not in the order of the requests.
    """
    model.eval()
    longest_first = sorted(requests, key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(longest_first), batch_size):
        yield from generate_batch(model, longest_first[start : start + batch_size], sampling, tokens)


def generate_batch(
    model: PreTrainedModel, batch: Sequence[Request], sampling: Sampling, tokens: SpecialTokens
) -> Iterator[Generation]:
    started = time.perf_counter()
    input_ids_BP, attention_mask_BP = left_padded([request.prompt_ids for request in batch], tokens.pad_id, model.device)
    chooser = [] if sampling.greedy else [DrawTokens(sampling, [request.seed for request in batch])]
    with torch.inference_mode(), bare_generation_config(model):
        sequences = model.generate(
            input_ids_BP,
            attention_mask=attention_mask_BP,
            generation_config=generation_config(sampling, tokens),
            logits_processor=LogitsProcessorList(chooser),
        )
    rows = sequences[:, input_ids_BP.shape[1] :].tolist()
    seconds = (time.perf_counter() - started) / len(batch)
    for request, row in zip(batch, rows, strict=True):
        yield Generation(request, *cut_at_stop(row, tokens.stop_ids), seconds)


def generation_config(sampling: Sampling, tokens: SpecialTokens) -> GenerationConfig:
    """Greedy choice of one row each; where tokens are drawn, DrawTokens leaves only the drawn one to choose."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(tokens.stop_ids),
        pad_token_id=tokens.pad_id,
    )


@contextmanager
def bare_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Set the checkpoint's generation defaults aside.

    `generate()` fills whatever a given GenerationConfig leaves unset from the model's own (top_k, repetition_penalty,
    …), so a checkpoint's generation_config.json would have a say in a score whose record does not mention it.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class DrawTokens(LogitsProcessor):
    """Draw each row's next token with the row's own random numbers, and leave no other token to choose."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Inverse of the cumulative distribution at one uniform number a row. scores: (B, V)."""
        probabilities_BV = torch.softmax(scores.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            probabilities_BV = keep_nucleus(probabilities_BV, self.sampling.top_p)
        cumulative_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
        # 32 bits: the product with the total stays below the total, so the search always ends on a token with
        # probability.
        uniform_B1 = torch.tensor([[generator.getrandbits(32) / 2**32] for generator in self.generators], dtype=torch.float64)
        drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B1.to(scores.device) * cumulative_BV[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B1, 0.0)


def keep_nucleus(probabilities_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest most likely tokens that together reach top_p (arXiv 1904.09751)."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
    likelier_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    return torch.zeros_like(probabilities_BV).scatter(1, order_BV, sorted_BV.where(likelier_BV < top_p, 0.0))


def left_padded(prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (B, P)."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def cut_at_stop(row: Sequence[int], stop_ids: Sequence[int]) -> tuple[tuple[int, ...], FinishReason]:
    """A row's tokens up to its first stop token; what follows is padding for the rows still running."""
    for position, token_id in enumerate(row):
        if token_id in stop_ids:
            return tuple(row[: position + 1]), "stop"
    return tuple(row), "length"


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one sample: 64 bits that follow from the evaluation's seed, the problem and the number of the
    sample.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}/{problem}".encode()).digest()[:8])


def special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Stop at the tokenizer's eos and at those the checkpoint's generation config names (chat models often have two).

    Raises:
        UserError: neither names one.
    """
    own = model.generation_config.eos_token_id
    named = [] if own is None else [own] if isinstance(own, int) else list(own)
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_ids = tuple(sorted({*named, *of_tokenizer}))
    if not stop_ids:
        raise UserError(
            "neither the tokenizer nor the generation config of this model names an end-of-sequence token, so no "
            "answer would ever "
            "end: set eos_token in its tokenizer_config.json"
        )
    return SpecialTokens(stop_ids, stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def check_fits_context(context: int, requests: Sequence[Request], max_new_tokens: int) -> None:
    """
    Args:
        context: tokens that the model was made for (max_position_embeddings).

    Raises:
        UserError: the longest prompt and max_new_tokens together exceed it.
    """
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > context:
        room = context - len(longest.prompt_ids)
        fix = f"set max_new_tokens to at most {room}" if room > 0 else "this model cannot be asked this problem"
        raise UserError(
            f"max_new_tokens={max_new_tokens}: with the {len(longest.prompt_ids)} tokens of the longest prompt "
            f"(problem {longest.problem}) that is more than the model's context of {context} tokens (max_position_embeddings); "
            f"{fix}"
        )
