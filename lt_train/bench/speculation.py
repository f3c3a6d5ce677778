"""Speculative decoding against plain decoding of the same model with the same KV budget, in one run.

A round is a number of steps of the draft and one forward pass of the model. Its times do not depend on the values of weights, keys
and values; the fraction of the draft's tokens that is accepted does, so it is measured on text that the model itself samples.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lt_train.bench.base import Base, StoredBase
from lt_train.bench.printing import measurement_table, print_lines
from lt_train.bench.roofline import Rates
from lt_train.benchmarks.haystack import endless
from lt_train.hybrid.kv_size import kv_bytes
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import KVStore, kv_sizes
from lt_train.inference.requests import Request, Sampling
from lt_train.inference.runner import ModelRunner
from lt_train.inference.sampler import likeliest_tokens
from lt_train.inference.step_graphs import until_captured
from lt_train.runtime.errors import UserError
from lt_train.runtime.units import MIB, format_bytes

TIMED_ROUNDS = 5
"""A time is the median over this number of rounds."""
SAMPLED, SAMPLED_TOKENS = 4, 128
"""Sequences, and tokens of each, by which the acceptance is measured."""
ASSUMED_ACCEPTANCE = 0.8
"""Of random weights, whose text is noise: SmolLM2-135M's with all layers streaming and a window of 124 tokens."""


@dataclass(frozen=True)
class RoundTimes:
    """Seconds. drafting: of one step of the draft. verifying: of the model's forward pass over the tokens of a round."""

    slots: int
    drafting: float
    verifying: float


@dataclass(frozen=True)
class Rounds:
    """Rounds of one model and its draft at one length of context.

    Attributes:
        acceptance: fraction of the draft's tokens that the model accepts.
        limit: the seconds that bytes and operations allow for a round. plain_limit: for one token without a draft.
        plain_rate: tokens a second without a draft, with as many sequences as the budget holds then.
    """

    context: int
    spec: HybridSpec
    times: RoundTimes
    length: int
    acceptance: float
    limit: float
    plain_limit: float
    plain_rate: float

    @property
    def tokens(self) -> float:
        """Tokens of all sequences in a round: of each, those accepted up to the first that is not, and the model's own."""
        return self.times.slots * sum(self.acceptance**number for number in range(self.length + 1))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.length * self.times.drafting + self.times.verifying)

    @property
    def faster(self) -> float:
        return self.tokens_per_second / self.plain_rate

    @property
    def allowed(self) -> float:
        """`faster`, where every pass takes what bytes and operations allow."""
        return self.tokens / self.limit * self.plain_limit


class DraftRounds:
    """The measurement and the table of `lt-train bench decode --draft`.

    Args:
        length: tokens that the draft proposes in a round.
        acceptance: fraction of them that the model accepts; None: measured, and assumed of random weights.
        w_recent: the window.

    Raises:
        UserError: `length` is not within the window.
    """

    def __init__(self, length: int, acceptance: float | None, w_recent: int) -> None:
        if length >= w_recent:
            raise UserError(
                f"--draft: {length}: not within the window of {w_recent} tokens. Fix: set it to at most {w_recent - 1}, such as 4"
            )
        self.length = length
        self.acceptance = acceptance
        self.source = "as given"
        self.rates: Rates | None = None
        self.found: list[Rounds] = []

    def time(
        self,
        model: HybridForCausalLM,
        base: Base,
        lengths: Sequence[int],
        budget: int,
        plain: Sequence[tuple[int, float]],
        rates: Rates,
    ) -> None:
        """Time one model's rounds at each length of context.

        Args:
            plain: at each length without a draft, the sequences that the budget holds and their tokens a second.
            rates: of this machine.

        Raises:
            UserError: the budget is below one sequence and the rings of its draft.
        """
        draft = Draft.of(model.spec, None, self.length)
        self.rates = rates
        acceptance = self.acceptance
        if acceptance is None and isinstance(base, StoredBase):
            acceptance = measured_acceptance(model, base.tokenizer(), draft)
            self.source = "of what the model samples after a window of made text"
        elif acceptance is None:
            acceptance, self.source = ASSUMED_ACCEPTANCE, "assumed, as the weights are random"
        for context, (slots, tokens_per_second) in zip(lengths, plain, strict=True):
            times = time_rounds(model, draft, context, budget)
            limit = self.length * pass_limit(rates, model, draft.spec, context, times.slots, 1)
            limit += pass_limit(rates, model, model.spec, context, times.slots, self.length + 1)
            plain_limit = pass_limit(rates, model, model.spec, context, slots, 1) / slots
            self.found.append(Rounds(context, model.spec, times, self.length, acceptance, limit, plain_limit, tokens_per_second))

    def print(self, console: Console) -> None:
        assert self.rates is not None, "something was timed"
        table = measurement_table(
            "context", "model", "slots", "draft", "verify", "accept", "tokens/s", "faster", "limit", "reached"
        )
        for each in sorted(self.found, key=lambda each: (each.context, len(each.spec.lazy_layers))):
            streaming = f"{len(each.spec.lazy_layers)}/{len(each.spec.full_in_base)}"
            row = [f"{each.context:,}", streaming, f"{each.times.slots}", f"{1000 * each.times.drafting:,.0f}"]
            row += [f"{1000 * each.times.verifying:,.0f}", f"{100 * each.acceptance:.0f} %", f"{each.tokens_per_second:,.1f}"]
            table.add_row(*row, f"{each.faster:.2f}x", f"{each.allowed:.2f}x", f"{100 * each.faster / each.allowed:.0f} %")
        layers = "all full layers" if self.found[0].spec.sliding_layers else "all layers"
        print_lines(
            console, f"\nspeculative decoding: {layers} stream in the draft, which proposes {self.length} tokens in a round"
        )
        console.print(table)
        print_lines(
            console,
            "draft, verify: ms of one step of the draft, and of the model's pass over a round\n"
            f"accept: fraction of the draft's tokens, {self.source}\n"
            "faster: tokens/s by those without a draft. limit: the same where each pass takes what\n"
            f"bytes and operations allow here: {self.rates.bandwidth / 1e9:,.1f} GB/s, {self.rates.products / 1e9:,.0f} GFLOP/s",
        )


@torch.inference_mode()
def time_rounds(model: HybridForCausalLM, draft: Draft, context: int, budget: int) -> RoundTimes:
    """Fill the budget with sequences of `context` tokens, the draft's rings included, and time rounds of all of them.

    Raises:
        UserError: the budget is below one such sequence.
    """
    sizes, length, tokens = kv_sizes(model, draft), draft.length, context + 1
    slots = budget // sizes.sequence(tokens)
    if slots == 0:
        needed = math.ceil(sizes.sequence(tokens) / MIB)
        raise UserError(
            f"--kv-budget: {format_bytes(budget)}: less than one sequence of {tokens:,} tokens and the rings of its draft. "
            f"Fix: set at least {needed:,} MiB"
        )
    store = KVStore(model, slots, slots * sizes.pages(tokens), draft)
    for _ in range(slots):
        store.lengths[store.admit(tokens + length)] = context
    for held in store.held:
        held.keys.normal_()
        held.values.normal_()
    runner = ModelRunner(model, store, prefill_chunk=1)
    passes = (lambda: runner.draft([1] * slots, length // 2), lambda: runner.verify([[1] * (length + 1)] * slots))
    for run in passes:
        until_captured(runner.graphs, run)
    return RoundTimes(slots, *map(median_seconds, passes))


def pass_limit(rates: Rates, model: HybridForCausalLM, spec: HybridSpec, context: int, slots: int, tokens: int) -> float:
    """Seconds of a forward pass over `tokens` tokens of every sequence (`Rates.step_seconds`)."""
    kv = slots * kv_bytes(model.config.to_dict(), spec, context, model.dtype.itemsize)
    return rates.step_seconds(model, slots, kv, tokens)


def median_seconds(run: Callable[[], Tensor]) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        likeliest_tokens(run())  # waits for the device
        return time.perf_counter() - started

    return median(seconds() for _ in range(TIMED_ROUNDS))


def measured_acceptance(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, draft: Draft) -> float:
    """The acceptance of tokens sampled at temperature 1 after a window of made sentences: within it the draft is the model."""
    engine = Engine(model, tokenizer, draft=draft, max_slots=SAMPLED)
    engine.stop_ids = ()  # what ends one text begins the next
    window = model.spec.window
    batch = engine.batch(engine.lay_out(SAMPLED, window + SAMPLED_TOKENS))
    for number in range(SAMPLED):
        batch.add(Request(str(number), 0, number, made_text(tokenizer, window, number)), Sampling(1.0, 1.0, SAMPLED_TOKENS))
    while not batch.is_empty:
        batch.step()
    return engine.acceptance.rate


def made_text(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> tuple[int, ...]:
    """Token ids of made sentences, `tokens` of them."""
    sentences = islice(endless(None, random.Random(seed)), tokens)  # of a token or more each
    return tuple(islice(cycle(tokenizer(" ".join(sentences), add_special_tokens=False).input_ids), tokens))
