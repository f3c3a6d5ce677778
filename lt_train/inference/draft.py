"""The draft of speculative decoding: the same weights, with more layers streaming.

Each round the draft proposes some tokens, and the model reads all of them in one forward pass. Every token is still drawn from the
model's own logits with the sample's own random number, and a proposed one is accepted if it is that token. So no answer depends on
the draft; the draft decides how many tokens a forward pass of the model gives.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError


@dataclass(frozen=True)
class Draft:
    """
    Attributes:
        spec: which layers stream while it drafts: those of the model, and others.
        length: the tokens that it proposes in one round.
    """

    spec: HybridSpec
    length: int

    @classmethod
    def of(cls, model: HybridSpec, layers: Collection[int] | None, length: int) -> "Draft":
        """The draft of a model, in which `layers` stream besides the model's own; None: all.

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
        compared: tokens of the draft that were compared with the model's: none behind one that was rejected.
        accepted: those that were the model's.
    """

    compared: int = 0
    accepted: int = 0

    def add(self, compared: int, accepted: int) -> None:
        self.compared += compared
        self.accepted += accepted

    @property
    def rate(self) -> float:
        """The fraction of the compared tokens that were accepted; 0 where none was compared."""
        return self.accepted / self.compared if self.compared else 0.0
