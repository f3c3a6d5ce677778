"""The built-in engine: continuous batching over slots, for hybrids and full models, on any device.

A sequence that ends frees its slot at once for the next one. Prompts are read in chunks; then all running sequences take a step
together. When pages run out, the youngest sequence is put back and later read again with the tokens it has; none is lost, and none
changes, because random numbers follow from (seed, position) alone.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.kv_store import KVStore, kv_sizes, pages_for
from lt_train.inference.requests import Answer, FinishReason, Request, Sampling, Watch
from lt_train.inference.runner import ModelRunner
from lt_train.inference.sampler import choose_tokens, penalise_repetition
from lt_train.inference.text import cut_at_stop_string, decode, stop_tokens, thinking_tokens
from lt_train.runtime.errors import UserError

FRACTION_OF_FREE_MEMORY = 0.8
"""What of the free memory the KV cache may take where no budget is given; activations need the rest."""


@dataclass
class Running:
    """One request on its way. `ids` are prompt and new tokens; `forced` come next, whatever the logits are."""

    request: Request
    ids: list[int]
    seconds: float = 0.0
    forced: deque[int] = field(default_factory=deque)

    @property
    def new(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.request.prompt_ids) :]


class Engine:
    """A model that answers many requests at once.

    Args:
        kv_budget: bytes for the KV cache; None: most of what is free on the model's device.
        max_slots: sequences at a time, at most.
        prefill_chunk: prompt tokens in one forward pass.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kv_budget: int | None = None,
        max_slots: int = 64,
        prefill_chunk: int = 2048,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.kv_budget = kv_budget
        self.max_slots = max_slots
        self.prefill_chunk = prefill_chunk
        self.stop_ids = stop_tokens(model, tokenizer)

    def answers(self, requests: Sequence[Request], sampling: Sampling, watch: Watch = lambda tokens: None) -> Iterator[Answer]:
        """Answer every request, each as soon as it is done.

        Raises:
            UserError: the budget does not hold the longest sequence that may come.
        """
        if requests:
            longest = max(len(request.prompt_ids) + limit(request, sampling) for request in requests)
            store = self.lay_out(len(requests), longest)
            yield from _Run(self, store, sampling, watch).answers(requests)

    def lay_out(self, requests: int, longest: int) -> KVStore:
        """Divide the budget: as many slots as hold sequences of three quarters of the longest length, all else pages.

        Sequences seldom reach the limit together; where they do, the youngest waits.
        """
        budget = self.kv_budget if self.kv_budget is not None else int(FRACTION_OF_FREE_MEMORY * free_memory(self.model.device))
        sizes = kv_sizes(self.model)
        needed = sizes.sequence(longest)
        if budget < needed:
            raise UserError(
                f"kv_budget: {budget:,} bytes do not hold one sequence of {longest:,} tokens (prompt and max_new_tokens), which "
                f"takes {needed:,}. Raise kv_budget to at least that, or lower max_new_tokens"
            )
        slots = max(1, min(self.max_slots, requests, budget // max(sizes.sequence(3 * longest // 4), 1)))
        pages = pages_for(longest) * slots
        if sizes.page:
            pages = min(pages, (budget - slots * sizes.slot) // sizes.page)
        return KVStore(self.model, slots, pages)


def limit(request: Request, sampling: Sampling) -> int:
    """The new tokens that this request may have."""
    return sampling.max_new_tokens if request.max_new_tokens is None else min(request.max_new_tokens, sampling.max_new_tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor could take there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class _Run:
    """One batch of requests. `running[slot]` is the sequence in that slot; the last one admitted is the youngest."""

    def __init__(self, engine: Engine, store: KVStore, sampling: Sampling, watch: Watch) -> None:
        self.watch = watch
        self.engine = engine
        self.store = store
        self.runner = ModelRunner(engine.model, store, engine.prefill_chunk)
        self.sampling = sampling
        self.running: list[Running] = []
        self.admitted: list[Running] = []
        """The running sequences, oldest first."""
        self.thinking_close = engine.tokenizer(sampling.thinking_close, add_special_tokens=False)["input_ids"]

    def answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        waiting = deque(Running(request, list(request.prompt_ids)) for request in requests)
        while waiting or self.running:
            yield from self._admit(waiting)
            if self.running:
                self._make_room(waiting)
                yield from self._step()

    def _admit(self, waiting: deque[Running]) -> Iterator[Answer]:
        """Fill free slots as long as there are pages for what waits, and one for the next token of each running sequence."""
        fresh: list[Running] = []
        while waiting and len(self.running) < self.store.slots:
            pages = pages_for(len(waiting[0].ids) + 1)
            if self.running and pages + len(self.running) > self.store.free_pages:
                break
            sequence = waiting.popleft()
            self.store.admit(len(sequence.ids))
            self.running.append(sequence)
            self.admitted.append(sequence)
            fresh.append(sequence)
        if fresh:
            yield from self._read(fresh)

    def _make_room(self, waiting: deque[Running]) -> None:
        """See that every running sequence has a page for its next token; put the youngest back until that is so."""
        while sum(self.store.missing_pages(slot, len(s.ids)) for slot, s in enumerate(self.running)) > self.store.free_pages:
            youngest = self.admitted[-1]
            self._remove(youngest)
            waiting.appendleft(youngest)
        for slot, sequence in enumerate(self.running):
            self.store.reserve(slot, len(sequence.ids))

    def _slot(self, sequence: Running) -> int:
        return next(slot for slot, other in enumerate(self.running) if other is sequence)

    def _remove(self, sequence: Running) -> None:
        slot = self._slot(sequence)
        moved = self.store.release(slot)
        self.running[slot] = self.running[moved]
        self.running.pop()
        self.admitted = [other for other in self.admitted if other is not sequence]

    def _read(self, fresh: Sequence[Running]) -> Iterator[Answer]:
        started = time.perf_counter()
        logits_NV = self.runner.prefill([(self._slot(sequence), sequence.ids) for sequence in fresh])
        self._divide_time(fresh, started)
        yield from self._take(fresh, logits_NV)

    def _step(self) -> Iterator[Answer]:
        started = time.perf_counter()
        sequences = list(self.running)
        logits_BV = self.runner.step([sequence.ids[-1] for sequence in sequences])
        self._divide_time(sequences, started)
        yield from self._take(sequences, logits_BV)

    def _divide_time(self, sequences: Sequence[Running], started: float) -> None:
        for sequence in sequences:
            sequence.seconds += (time.perf_counter() - started) / len(sequences)

    def _take(self, sequences: Sequence[Running], logits_BV: Tensor) -> Iterator[Answer]:
        """Choose the next token of each sequence; those that end leave their slot and become answers."""
        self.watch(len(sequences))
        if self.sampling.repetition_penalty != 1:
            logits_BV = penalise_repetition(logits_BV.clone(), [s.ids for s in sequences], self.sampling.repetition_penalty)
        seeds = [sequence.request.seed for sequence in sequences]
        positions = [sequence.new for sequence in sequences]
        for sequence, chosen in zip(sequences, choose_tokens(logits_BV, self.sampling, seeds, positions), strict=True):
            sequence.ids.append(sequence.forced.popleft() if sequence.forced else chosen)
            if sequence.new == self.sampling.thinking_budget:
                self._close_reasoning(sequence)
            answer = self._finished(sequence)
            if answer is not None:
                self._remove(sequence)
                yield answer

    def _close_reasoning(self, sequence: Running) -> None:
        if thinking_tokens(self.engine.tokenizer, sequence.new_ids) is None and sequence.ids[-1] not in self.engine.stop_ids:
            sequence.forced.extend(self.thinking_close)

    def _finished(self, sequence: Running) -> Answer | None:
        tokenizer, stop = self.engine.tokenizer, self.sampling.stop
        if sequence.ids[-1] in self.engine.stop_ids:
            return self._answer(sequence, decode(tokenizer, sequence.new_ids[:-1]), "stop")
        if stop and cut_at_stop_string(decode(tokenizer, sequence.ids[-min(self._stop_tokens, sequence.new) :]), stop) is not None:
            text = decode(tokenizer, sequence.new_ids)
            before_stop = cut_at_stop_string(text, stop)
            return self._answer(sequence, text if before_stop is None else before_stop, "stop")
        if sequence.new == limit(sequence.request, self.sampling):
            return self._answer(sequence, decode(tokenizer, sequence.new_ids), "length")
        return None

    @property
    def _stop_tokens(self) -> int:
        """The last tokens among which a stop string must lie that the newest one has completed: a byte each at worst."""
        return 1 + max(len(string.encode()) for string in self.sampling.stop)

    def _answer(self, sequence: Running, text: str, reason: FinishReason) -> Answer:
        new_ids = sequence.new_ids
        thinking = thinking_tokens(self.engine.tokenizer, new_ids)
        return Answer(sequence.request, text, len(new_ids), thinking, reason, sequence.seconds)
