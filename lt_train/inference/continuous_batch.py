"""The sequences that an engine generates together: they come and go at any time, each with its own sampling.

A sequence that ends frees its slot at once for the next one. Prompts are read in chunks; then all running sequences take a step
together. When pages run out, the youngest sequence is put back and later read again with the tokens it has; none is lost, and none
changes, because random numbers follow from (seed, position) alone. Where each prompt decides which layers stream, a sequence begins
only when there are pages for all of it, and is not put back. With a draft a step gives each sequence the tokens that the draft
guessed, up to the first incorrect one, and the model's own token after them.

Shapes: B running sequences, T tokens that a step reads of each, V vocab_size.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.draft import Acceptance, DraftLength
from lt_train.inference.kv_store import KVStore
from lt_train.inference.per_prompt_store import PerPromptStore, check_read_at_once
from lt_train.inference.requests import Answer, FinishReason, Logprobs, Request, Sampling
from lt_train.inference.runner import ModelRunner
from lt_train.inference.sampler import choose_tokens, penalise_repetition
from lt_train.inference.text import closed_by_prompt, cut_at_stop_string, decode, thinking_tokens


@dataclass(eq=False)
class Running:
    """One request on its way. `ids` are prompt and new tokens; `forced` come next, whatever the logits are."""

    request: Request
    sampling: Sampling
    ids: list[int]
    seconds: float = 0.0
    forced: deque[int] = field(default_factory=deque)

    @property
    def new(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def limit(self) -> int:
        """The new tokens that this sequence may have."""
        return limit(self.request, self.sampling)


@dataclass(frozen=True)
class NewToken:
    """A token that a step gave a sequence.

    Attributes:
        logprobs: where the request has them on.
        answer: the complete answer, where this token is its last.
    """

    sequence: Running
    token_id: int
    logprobs: Logprobs | None
    answer: Answer | None


def limit(request: Request, sampling: Sampling) -> int:
    """The new tokens that a request may have."""
    return sampling.max_new_tokens if request.max_new_tokens is None else min(request.max_new_tokens, sampling.max_new_tokens)


class ContinuousBatch:
    """Sequences in one KV store. `running[slot]` is the sequence in that slot; the last one admitted is the youngest.

    Args:
        store: it must hold any one sequence that is added, up to its limit.
        prefill_chunk: prompt tokens in one forward pass.
        stop_ids: the tokens that end an answer.
        acceptance: to count what comes of the draft's tokens.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        store: KVStore | PerPromptStore,
        prefill_chunk: int,
        stop_ids: Collection[int],
        acceptance: Acceptance | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.store = store
        self.acceptance = Acceptance() if acceptance is None else acceptance
        draft = store.draft if isinstance(store, KVStore) else None
        self.draft_length = None if draft is None else DraftLength(draft, self.acceptance)
        self.runner = ModelRunner(model, store, prefill_chunk)
        self.stop_ids = stop_ids
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.admitted: list[Running] = []
        """The running sequences, oldest first."""

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request, sampling: Sampling) -> Running:
        """Queue a request; it begins as soon as there is a slot.

        Raises:
            UserError: a prompt that decides which layers stream does not fit in one forward pass.
        """
        if isinstance(self.store, PerPromptStore):
            check_read_at_once(request, self.runner.prefill_chunk)
        sequence = Running(request, sampling, list(request.prompt_ids))
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Running) -> None:
        """Drop a sequence and free what it holds; one that has ended is none of the batch's any more."""
        if sequence in self.running:
            self._remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> list[NewToken]:
        """Read the prompts of sequences that there is room for, then give every running sequence its next token."""
        fresh = self._admit()
        tokens = self._read(fresh) if fresh else []
        if self.running:
            self._make_room()
            tokens += self._step()
        return tokens

    def _admit(self) -> list[Running]:
        """Fill free slots as long as the store has room for what waits."""
        fresh: list[Running] = []
        while self.waiting and len(self.running) < self.store.slots:
            tokens = self._tokens_to_admit(self.waiting[0])
            if self.running and not self.store.has_room(tokens):
                break
            sequence = self.waiting.popleft()
            self.store.admit(tokens)
            self.running.append(sequence)
            self.admitted.append(sequence)
            fresh.append(sequence)
        return fresh

    def _tokens_to_admit(self, sequence: Running) -> int:
        if isinstance(self.store, PerPromptStore):
            return len(sequence.request.prompt_ids) + sequence.limit
        return len(sequence.ids)

    def _make_room(self) -> None:
        """See that every running sequence has pages for its next tokens; put the youngest back until that is so."""
        drafted, missing = 0 if self.draft_length is None else self.draft_length.draft.length, self.store.missing_pages
        while sum(missing(slot, len(s.ids) + drafted) for slot, s in enumerate(self.running)) > self.store.free_pages:
            youngest = self.admitted[-1]
            self._remove(youngest)
            self.waiting.appendleft(youngest)
        for slot, sequence in enumerate(self.running):
            self.store.reserve(slot, len(sequence.ids) + drafted)

    def _remove(self, sequence: Running) -> None:
        slot = self.running.index(sequence)
        moved = self.store.release(slot)
        self.running[slot] = self.running[moved]
        self.running.pop()
        self.admitted.remove(sequence)

    def _read(self, fresh: Sequence[Running]) -> list[NewToken]:
        started = time.perf_counter()
        logits_NV = self.runner.prefill([(self.running.index(sequence), sequence.ids) for sequence in fresh])
        self._divide_time(fresh, started)
        return self._take(fresh, logits_NV)

    def _step(self) -> list[NewToken]:
        sequences = list(self.running)
        started = time.perf_counter()
        if self.draft_length is None:
            logits_BV = self.runner.step([sequence.ids[-1] for sequence in sequences])
            self._divide_time(sequences, started)
            return self._take(sequences, logits_BV)
        drafted = self._draft(sequences, self.draft_length.next())
        logits_BTV = self.runner.verify([[s.ids[-1], *tokens] for s, tokens in zip(sequences, drafted, strict=True)])
        self._divide_time(sequences, started)
        taken = self._accept(sequences, drafted, logits_BTV)
        self.draft_length.took(len(drafted[0]), time.perf_counter() - started)
        return taken

    def _draft(self, sequences: Sequence[Running], length: int) -> list[list[int]]:
        """The draft's guess of the next tokens of each sequence, `length` of them; fewer where all sequences end earlier."""
        drafted: list[list[int]] = [[] for _ in sequences]
        for number in range(min(length, max(s.limit - s.new for s in sequences) - 1)):
            latest = [(tokens or sequence.ids)[-1] for sequence, tokens in zip(sequences, drafted, strict=True)]
            chosen = _choose(sequences, self.runner.draft(latest, number), drafted)
            for sequence, tokens, token_id in zip(sequences, drafted, chosen, strict=True):
                tokens.append(sequence.forced[number] if number < len(sequence.forced) else token_id)
        return drafted

    def _accept(self, sequences: Sequence[Running], drafted: Sequence[Sequence[int]], logits_BTV: Tensor) -> list[NewToken]:
        """Give each sequence the model's tokens, up to the first that the draft did not guess or that ends it."""
        taken: list[NewToken] = []
        self.acceptance.rounds += len(sequences)
        rows = list(range(len(sequences)))
        for number in range(logits_BTV.shape[1]):
            new = self._take([sequences[row] for row in rows], logits_BTV[rows, number])
            taken += new
            if number == len(drafted[0]) or not rows:
                break
            guessed = [token.token_id == drafted[row][number] for row, token in zip(rows, new, strict=True)]
            self.acceptance.compared += len(rows)
            self.acceptance.accepted += sum(guessed)
            rows = [row for row, token, correct in zip(rows, new, guessed, strict=True) if correct and token.answer is None]
        for slot, sequence in enumerate(self.running):
            self.store.lengths[slot] = len(sequence.ids) - 1
        return taken

    def _divide_time(self, sequences: Sequence[Running], started: float) -> None:
        for sequence in sequences:
            sequence.seconds += (time.perf_counter() - started) / len(sequences)

    def _take(self, sequences: Sequence[Running], logits_BV: Tensor) -> list[NewToken]:
        """Choose the next token of each sequence; those that end leave their slot."""
        taken = []
        for row, (sequence, chosen) in enumerate(zip(sequences, _choose(sequences, logits_BV), strict=True)):
            token_id = sequence.forced.popleft() if sequence.forced else chosen
            sequence.ids.append(token_id)
            if sequence.new == sequence.sampling.thinking_budget:
                self._close_reasoning(sequence)
            answer = self._finished(sequence)
            if answer is not None:
                self._remove(sequence)
            taken.append(NewToken(sequence, token_id, _logprobs(sequence.request, logits_BV[row], token_id), answer))
        return taken

    def _close_reasoning(self, sequence: Running) -> None:
        """Where it is still open: neither the prompt nor the answer has closed it."""
        close = sequence.sampling.thinking_close
        if (
            thinking_tokens(self.tokenizer, sequence.new_ids, close) is None
            and not closed_by_prompt(self.tokenizer, sequence.request.prompt_ids, close)
            and sequence.ids[-1] not in self.stop_ids
        ):
            sequence.forced.extend(self.tokenizer(close, add_special_tokens=False)["input_ids"])

    def _finished(self, sequence: Running) -> Answer | None:
        stop = sequence.sampling.stop
        if sequence.ids[-1] in self.stop_ids:
            return self._answer(sequence, decode(self.tokenizer, sequence.new_ids[:-1]), "stop")
        if stop and cut_at_stop_string(decode(self.tokenizer, _latest_tokens(sequence, stop)), stop) is not None:
            text = decode(self.tokenizer, sequence.new_ids)
            before_stop = cut_at_stop_string(text, stop)
            return self._answer(sequence, text if before_stop is None else before_stop, "stop")
        if sequence.new == sequence.limit:
            return self._answer(sequence, decode(self.tokenizer, sequence.new_ids), "length")
        return None

    def _answer(self, sequence: Running, text: str, reason: FinishReason) -> Answer:
        new_ids = sequence.new_ids
        thinking = thinking_tokens(self.tokenizer, new_ids, sequence.sampling.thinking_close)
        return Answer(sequence.request, text, len(new_ids), thinking, reason, sequence.seconds)


def _choose(sequences: Sequence[Running], logits_BV: Tensor, ahead: Sequence[Sequence[int]] | None = None) -> list[int]:
    """The next token of each sequence; those with the same sampling are drawn together.

    Args:
        ahead: tokens of the draft that follow those of each sequence.
    """
    chosen = [0] * len(sequences)
    after = [()] * len(sequences) if ahead is None else ahead
    for sampling in dict.fromkeys(sequence.sampling for sequence in sequences):
        rows = [row for row, sequence in enumerate(sequences) if sequence.sampling == sampling]
        logits_RV = logits_BV if len(rows) == len(sequences) else logits_BV[rows]
        if sampling.repetition_penalty != 1:
            seen = [[*sequences[row].ids, *after[row]] for row in rows]
            logits_RV = penalise_repetition(logits_RV.clone(), seen, sampling.repetition_penalty)
        seeds = [sequences[row].request.seed for row in rows]
        positions = [sequences[row].new + len(after[row]) for row in rows]
        for row, token_id in zip(rows, choose_tokens(logits_RV, sampling, seeds, positions), strict=True):
            chosen[row] = token_id
    return chosen


def _logprobs(request: Request, logits_V: Tensor, token_id: int) -> Logprobs | None:
    if request.logprobs is None:
        return None
    logprobs_V = logits_V.log_softmax(-1)
    top = torch.topk(logprobs_V, request.logprobs)
    return Logprobs(logprobs_V[token_id].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def _latest_tokens(sequence: Running, stop: Sequence[str]) -> list[int]:
    """The last new tokens, which must hold a stop string that the newest one has completed: a byte each at worst."""
    most = 1 + max(len(string.encode()) for string in stop)
    return sequence.ids[-min(most, sequence.new) :]
