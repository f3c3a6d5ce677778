"""How steady a choice is: the layers or KV heads chosen on one half of the samples against those chosen on the other half."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

LARGEST_LOSS = 0.05
"""The largest fraction of its gain that a choice may be expected to lose by chance."""

Select = Callable[[Sequence[Sequence[float]], int], tuple[int, ...]]
"""(scores[sample][layer], n_layers) -> the layers that stream."""


@dataclass(frozen=True)
class Stability:
    """
    Attributes:
        same: number of layers that both halves choose, of `n_layers`.
        unit: what is chosen, "layers" or "KV heads".
        by_chance: what `same` would be for two random choices, on average.
        lost: estimate of the fraction of its gain that the choice on all samples loses by chance. The gain of a choice is the cost
            of as many random layers less that of the chosen ones, a cost being a layer's mean score.
    """

    samples: int
    n_layers: int
    same: int
    by_chance: float
    lost: float
    unit: str = "layers"

    @property
    def samples_needed(self) -> int:
        """How many samples would do, the loss being inversely proportional to their number."""
        return max(self.samples, math.ceil(self.samples * self.lost / LARGEST_LOSS))

    @property
    def overlap(self) -> str:
        return f"the halves of the samples choose {self.same} of {self.n_layers} {self.unit} alike ({self.by_chance:.1f} by chance)"

    @property
    def is_steady(self) -> bool:
        return self.lost <= LARGEST_LOSS


def compare_halves(
    scores: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], select: Select, n_layers: int, unit: str = "layers"
) -> Stability:
    """Compare the choices on even and on odd samples, at least one each.

    Args:
        scores: `scores[sample][layer]`, what `select` takes.
        costs: the same, lower for layers that lose less by streaming.
        unit: what "layers" are here: KV heads of all layers are chosen in the same way.

    On the other half's mean costs each choice gains less than that half's own choice does. One gain is too low by the error of the
    choice, the other too high by about as much, as it is judged by the scores that it was made from; the gain of the best choice
    is in the middle. Choices err where layers differ by less than the standard errors, by about as much as these, so a loss is
    proportional to their square: with all samples it is half of that with half of them.
    """
    halves = [range(0, len(scores), 2), range(1, len(scores), 2)]
    chosen = [select([scores[sample] for sample in half], n_layers) for half in halves]
    cost_L = [[fmean(column) for column in zip(*(costs[sample] for sample in half), strict=True)] for half in halves]

    def gain(judge: int, choice: int) -> float:
        return n_layers * fmean(cost_L[judge]) - math.fsum(cost_L[judge][layer] for layer in chosen[choice])

    own = fmean(gain(half, half) for half in (0, 1))
    other = fmean(gain(half, 1 - half) for half in (0, 1))
    return Stability(
        samples=len(scores),
        n_layers=n_layers,
        same=len(set(chosen[0]) & set(chosen[1])),
        by_chance=n_layers**2 / len(scores[0]),
        lost=_lost(own, other),
        unit=unit,
    )


def _lost(own: float, other: float) -> float:
    """The fraction of the best choice's gain that a choice on all samples loses, from gains on the own and on the other half."""
    if own <= other:
        return 0.0
    best, lost_by_half = (own + other) / 2, (own - other) / 2
    return min(lost_by_half / 2 / best, 1.0) if best > 0 else 1.0


def describe_stability(strategy: str, stability: Stability | None) -> Iterator[str]:
    """Lines for the log: the overlap of the halves, and a warning where there are too few samples."""
    if stability is None:
        yield (
            f"warning: {strategy}: one sample does not show whether another would choose the same. "
            "Fix: raise hybrid.calibration.samples"
        )
        return
    yield f"{strategy}: {stability.overlap}"
    if not stability.is_steady:
        yield (
            f"warning: {strategy}: {stability.samples} samples are too few for the spread between them: the choice is expected to "
            f"lose {stability.lost:.0%} of its gain over a random one by chance. "
            f"Fix: raise hybrid.calibration.samples; about {stability.samples_needed} would do for a loss of {LARGEST_LOSS:.0%}"
        )
