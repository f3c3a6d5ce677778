"""The draft of speculative decoding: the same weights, with more layers or KV heads streaming.

Each round the draft proposes some tokens, and the model reads all of them in one forward pass. Every token is still drawn from the
model's own logits with the sample's own random number, and a proposed one is accepted if it is that token. So no answer depends on
the draft; the draft decides how many tokens a forward pass of the model gives.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError

LONGEST = 8
"""Most tokens of a round, where measurements choose the number: at an acceptance of 0.9 a ninth is accepted in 39 % of rounds."""

FIRST_ROUNDS = 4
"""Rounds whose times replace earlier ones, which may include allocations."""
ROUNDS_BETWEEN_TIMINGS = 32


@dataclass(frozen=True)
class Draft:
    """
    Attributes:
        spec: what streams while it drafts: what does in the model, and more.
        length: the tokens that it proposes in one round.
        adapts: it proposes fewer, or none, where that gives more tokens a second (`DraftLength`).
    """

    spec: HybridSpec
    length: int
    adapts: bool = False

    @classmethod
    def of(
        cls,
        model: HybridSpec,
        streaming: HybridSpec | Collection[int] | None,
        length: int | None,
        written: Callable[[str], str] = str,
    ) -> "Draft":
        """The draft of a model.

        Args:
            streaming: layers that stream in the draft besides what streams in the model, None: all; or a hybrid of this base, which
                drafts for the base.
            length: tokens of a round; None: as many as measurements suggest.
            written: how the user wrote a setting of the recipe, for messages.

        Raises:
            UserError: it would be the model itself, or is none that the engine can run.
        """
        if model.learned_sinks:
            problem = "layers that stream in the draft alone have no learned sinks"
            raise UserError(f"{written('draft')}: {problem}. Fix: set hybrid.sink to tokens, or remove {written('draft')}")
        spec = _draft_spec(model, streaming, written("draft_layers"))
        if spec == model:
            problem = "all of them stream in the model too, so the draft would be the model itself"
            fix = f"name a layer that is full in the model, or remove {written('draft')}"
            raise UserError(f"{written('draft_layers')}: {list(spec.lazy_layers)}: {problem}. Fix: {fix}")
        window = min(model.w_recent, model.sliding_window or model.w_recent)
        if length is None:
            return cls(spec, max(1, min(LONGEST, window - 1)), adapts=True)
        if not 0 < length < window:
            problem = f"not within the window of {window} tokens"
            raise UserError(f"{written('draft_length')}: {length}: {problem}. Fix: set it from 1 to {window - 1}, such as 4")
        return cls(spec, length)


def _draft_spec(model: HybridSpec, streaming: HybridSpec | Collection[int] | None, setting: str) -> HybridSpec:
    if isinstance(streaming, HybridSpec):
        return replace(model, lazy_layers=streaming.lazy_layers, split_layers=streaming.split_layers)
    everything = model.full_in_base
    if outside := sorted(set(streaming or ()) - set(range(model.num_layers))):
        raise UserError(f"{setting}: {outside}: not in the model. Fix: name layers from 0 to {model.num_layers - 1}")
    if sliding := sorted(set(streaming or ()) & set(model.sliding_layers)):
        raise UserError(
            f"{setting}: {sliding}: they see {model.sliding_window:,} tokens in the base already. "
            f"Fix: name layers of {list(everything)}"
        )
    lazy = {*model.lazy_layers, *(everything if streaming is None else streaming)}
    split = tuple((layer, heads) for layer, heads in model.split_layers if layer not in lazy)
    return replace(model, lazy_layers=tuple(lazy), split_layers=split)


def rows_of_step(sequences: int, draft: Draft | None) -> int:
    """Tokens that the model reads in one forward pass, at most: of each sequence its own one and those of the draft."""
    return sequences * (1 if draft is None else draft.length + 1)


@dataclass
class Acceptance:
    """Counts of the draft's tokens.

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

    A draft that adapts takes what promises the most tokens a second, by the acceptance so far and by times: a round's is close to
    linear in its length, so rounds with and without a draft give it. Both kinds are timed at first, and later the one that is not
    chosen now and then, because times change as sequences grow and end.
    """

    def __init__(self, draft: Draft, acceptance: Acceptance) -> None:
        self.draft = draft
        self.acceptance = acceptance
        self.rounds = 0
        self.without = 0.0
        """Seconds of a round without a draft: a moving average."""
        self.each_token = 0.0
        """Seconds that a drafted token adds: a moving average."""

    def next(self) -> int:
        longest = self.draft.length
        if not self.draft.adapts:
            return longest
        if self.rounds < FIRST_ROUNDS:
            return 0 if self.rounds % 2 == 0 else (longest + 1) // 2
        best = max(range(longest + 1), key=self._tokens_per_second)
        if self.rounds % ROUNDS_BETWEEN_TIMINGS == 0:
            return 0 if best else min(2, longest)
        return best

    def took(self, length: int, seconds: float) -> None:
        """Note the time of a round in which this number of tokens was drafted."""
        kept = 0.0 if self.rounds < FIRST_ROUNDS else 0.5
        if length == 0:
            self.without = kept * self.without + (1 - kept) * seconds
        else:
            self.each_token = kept * self.each_token + (1 - kept) * max(seconds - self.without, 0) / length
        self.rounds += 1

    def _tokens_per_second(self, length: int) -> float:
        expected_tokens = sum(self.acceptance.rate**number for number in range(length + 1))
        return expected_tokens / (self.without + length * self.each_token)
