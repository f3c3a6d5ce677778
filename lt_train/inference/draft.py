"""The draft of speculative decoding: the same weights, with more layers streaming.

Each round the draft proposes some tokens, and the model reads all of them in one forward pass. Every token is still drawn from the
model's own logits with the sample's own random number, and a proposed one is accepted if it is that token. So no answer depends on
the draft; the draft decides how many tokens a forward pass of the model gives.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError

LONGEST = 8
"""Tokens of a round, at most, where measurements choose the number: at an acceptance of 0.9 a ninth is right in 39 % of rounds."""

ROUNDS_BETWEEN_TIMINGS = 16


@dataclass(frozen=True)
class Draft:
    """
    Attributes:
        spec: which layers stream while it drafts: those of the model, and others.
        length: the tokens that it proposes in one round.
        adapts: it proposes fewer, or none, where that gives more tokens a second (`DraftLength`).
    """

    spec: HybridSpec
    length: int
    adapts: bool = False

    @classmethod
    def of(cls, model: HybridSpec, layers: Collection[int] | None, length: int | None) -> "Draft":
        """The draft of a model.

        Args:
            layers: stream in the draft besides those that stream in the model; None: all.
            length: tokens of a round; None: as many as measurements suggest.

        Raises:
            UserError: it would be the model itself, or is none that the engine can run.
        """
        everything = range(model.num_layers)
        if model.learned_sinks:
            problem, fix = (
                "layers that stream in the draft alone have no learned sinks",
                "set hybrid.sink to tokens, or remove draft",
            )
            raise UserError(f"draft: {problem}. Fix: {fix}")
        if outside := sorted(set(layers or ()) - set(everything)):
            raise UserError(f"draft_layers: {outside}: not in the model. Fix: name layers from 0 to {model.num_layers - 1}")
        lazy = {*model.lazy_layers, *(everything if layers is None else layers)}
        if lazy == set(model.lazy_layers):
            raise UserError(
                f"draft_layers: {sorted(lazy)}: all of them stream in the model too, so the draft would be the model itself. "
                "Fix: name a layer that is full in the model, or remove draft"
            )
        if length is None:
            return cls(replace(model, lazy_layers=tuple(sorted(lazy))), max(1, min(LONGEST, model.w_recent - 1)), adapts=True)
        if not 0 < length < model.w_recent:
            raise UserError(
                f"draft_length: {length}: not within the window of {model.w_recent} tokens. "
                f"Fix: set it from 1 to {model.w_recent - 1}, such as 4"
            )
        return cls(replace(model, lazy_layers=tuple(sorted(lazy))), length)


@dataclass
class Acceptance:
    """What came of the draft's tokens.

    Attributes:
        rounds: forward passes of the model, counted for each sequence in them.
        compared: tokens of the draft that were compared with the model's: none behind one that was rejected.
        accepted: those that were the model's.
    """

    rounds: int = 0
    compared: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """The fraction of the compared tokens that were accepted; 0 where none was compared."""
        return self.accepted / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        accepted = f"{100 * self.rate:.0f} % of the draft's tokens accepted"
        return f"{accepted}, {self.tokens_per_round:.2f} tokens in a forward pass of the model"

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a forward pass of the model gives a sequence, its own one included."""
        return 1 + self.accepted / max(self.rounds, 1)


class DraftLength:
    """The number of tokens that the draft proposes in the next round.

    A draft that adapts takes what promises the most tokens a second. Three lengths are timed at first, and again from time to time,
    because a round takes longer as sequences grow and less as they end; between them its time is close to linear.
    """

    def __init__(self, draft: Draft, acceptance: Acceptance) -> None:
        self.draft = draft
        self.acceptance = acceptance
        self.timed = (draft.length, 0, draft.length // 2)
        self.rounds = 0
        self.seconds: dict[int, float] = {}
        """Of a round, by its length: a moving average."""

    def next(self) -> int:
        if not self.draft.adapts:
            return self.draft.length
        if self.rounds < 2 * len(self.timed):  # the first time may include allocations
            return self.timed[self.rounds % len(self.timed)]
        if self.rounds % ROUNDS_BETWEEN_TIMINGS == 0:
            return self.timed[self.rounds // ROUNDS_BETWEEN_TIMINGS % len(self.timed)]
        return max(range(self.draft.length + 1), key=self._tokens_per_second)

    def took(self, length: int, seconds: float) -> None:
        """Note the time of a round in which this number of tokens was drafted."""
        before = self.seconds.get(length, seconds) if self.rounds >= 2 * len(self.timed) else seconds
        self.seconds[length] = (before + seconds) / 2
        self.rounds += 1

    def _tokens_per_second(self, length: int) -> float:
        expected_tokens = sum(self.acceptance.rate**number for number in range(length + 1))
        lengths = sorted(self.seconds)
        return float(expected_tokens / np.interp(length, lengths, [self.seconds[each] for each in lengths]))
