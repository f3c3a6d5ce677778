"""The layer profile: one score per layer, strategy and sample, with its fingerprint; how it is saved and loaded.

Reading one loads no torch. `scoring` computes it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.fingerprints import check_same
from lt_train.selection.chosen import heads_by_layer
from lt_train.selection.fingerprint import Fingerprint
from lt_train.selection.periodic import periodic_layers
from lt_train.selection.quadrature import POINTS
from lt_train.selection.ranking import most_often_lazy, smallest_rise
from lt_train.selection.stability import Select, Stability, compare_halves

_FromFile = TypeVar("_FromFile")

SCORED = ("gates", "reach", "nll", "kl", "lazy_ratio")
"""Strategies that score the model; `periodic` and `random` do not."""


@dataclass(frozen=True)
class SampleScores:
    """One calibration sample's scores: `scores[strategy][layer]`; 0 of layers that slide in the base, which no strategy scores."""

    id: str
    tokens: int
    """Prompt and answer."""
    scores: dict[str, tuple[float, ...]]
    all_streaming: dict[str, float]
    """The measured rise, or divergence, when every layer streams, for each strategy but `lazy_ratio`."""
    head_shares: tuple[tuple[float, ...], ...] = ()
    """`gates`: the share of each KV head, `head_shares[layer][kv_head]`."""
    sum_of_shares: float | None = None
    """`gates`: the shares together, to compare with `all_streaming`."""
    gate_points: int = len(POINTS)
    """`gates`: values of the gates at which gradients were taken."""

    def joined(self, other: "SampleScores") -> "SampleScores":
        """With the scores of `other`, by further strategies."""
        by_gates = other if "gates" in other.scores else self
        scores, all_streaming = self.scores | other.scores, self.all_streaming | other.all_streaming
        return dataclasses.replace(by_gates, scores=scores, all_streaming=all_streaming)


@dataclass(frozen=True)
class LayerProfile:
    """Scores of every layer that can stream on every sample that is longer than the window."""

    fingerprint: Fingerprint
    num_layers: int
    samples: tuple[SampleScores, ...]
    fitting: tuple[str, ...]
    """Ids of calibration samples skipped because they fit inside the window."""
    started: str
    """UTC, ISO 8601."""
    sliding_layers: tuple[int, ...] = ()
    """Those that have a window in the base: they cannot stream, and are not scored."""

    @property
    def full_in_base(self) -> tuple[int, ...]:
        """The layers that can stream."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.sliding_layers)

    @property
    def strategies(self) -> tuple[str, ...]:
        return self.fingerprint.strategies

    @property
    def scores(self) -> dict[str, list[tuple[float, ...]]]:
        """`scores[strategy][sample][layer]`."""
        return {strategy: [sample.scores[strategy] for sample in self.samples] for strategy in self.strategies}

    def choose(self, strategy: str, n_layers: int) -> tuple[int, ...]:
        """The `n_layers` layers, ascending, that lose least by streaming according to `strategy`.

        Raises:
            UserError: the profile has no scores of that strategy.
        """
        if strategy == "periodic":
            return tuple(self.full_in_base[place] for place in periodic_layers(n_layers, len(self.full_in_base)))
        if strategy not in self.strategies:
            raise UserError(
                f"hybrid.strategy: {strategy}: not in this layer profile, which has {', '.join(self.strategies)}. "
                "Fix: score the layers again with it"
            )
        places = _selection(strategy)(self._scores_of_full(strategy), n_layers)
        return tuple(self.full_in_base[place] for place in places)

    def _scores_of_full(self, strategy: str) -> list[tuple[float, ...]]:
        """`scores[sample]` of the layers that can stream, in their order."""
        return [tuple(score_L[layer] for layer in self.full_in_base) for score_L in self.scores[strategy]]

    def choose_heads(self, n_heads: int) -> list[tuple[int, ...]]:
        """By layer, the KV heads of the `n_heads` whose shares by `gates` are smallest; ties go to the lower layer and head.

        Raises:
            UserError: the profile has no shares of KV heads.
        """
        shares = self._head_shares()
        return heads_by_layer(smallest_rise(shares, n_heads), self.num_layers, self.kv_heads, self.sliding_layers)

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer, in a profile with scores by `gates`."""
        return len(self.samples[0].head_shares[0])

    def _head_shares(self) -> list[list[float]]:
        """`shares[sample][kv head of all layers that can stream]`.

        Raises:
            UserError: the profile has none.
        """
        if "gates" not in self.strategies:
            raise UserError(
                f"hybrid.granularity: kv_head: this layer profile has no shares of KV heads, only {', '.join(self.strategies)}. "
                "Fix: score the layers again with strategy gates"
            )
        return [[share for layer in self.full_in_base for share in sample.head_shares[layer]] for sample in self.samples]

    def joined(self, other: "LayerProfile", where: str) -> "LayerProfile":
        """With the scores of `other`, by further strategies, on the same samples.

        Args:
            where: the file of this one.

        Raises:
            UserError: the two are of another model, other data, sizes or versions.
        """
        no_strategies = {"strategies": ()}
        check_same(
            dataclasses.asdict(self.fingerprint) | no_strategies,
            dataclasses.asdict(other.fingerprint) | no_strategies,
            f"{where}: these scores have another fingerprint",
            "give this run another name, or delete that folder to score again",
        )
        both = {*self.strategies, *other.strategies}
        strategies = tuple(strategy for strategy in SCORED if strategy in both)
        samples = tuple(mine.joined(theirs) for mine, theirs in zip(self.samples, other.samples, strict=True))
        return dataclasses.replace(self, fingerprint=dataclasses.replace(self.fingerprint, strategies=strategies), samples=samples)

    def stability(self, strategy: str, n_layers: int) -> Stability | None:
        """How far two halves of the samples agree on the layers; None for a single sample. `strategy` is one that was scored."""
        if len(self.samples) < 2:
            return None
        scores = self._scores_of_full(strategy)
        costs = [[-score for score in score_L] for score_L in scores] if strategy == "lazy_ratio" else scores
        return compare_halves(scores, costs, _selection(strategy), n_layers)

    def stability_of_heads(self, n_heads: int) -> Stability | None:
        """As `stability`, of the KV heads that `gates` chooses.

        Raises:
            UserError: the profile has no shares of KV heads.
        """
        shares = self._head_shares()
        return compare_halves(shares, shares, smallest_rise, n_heads, "KV heads") if len(shares) > 1 else None

    def mean_all_streaming(self, strategy: str) -> float:
        """The measured rise, or divergence, when every layer streams, averaged over samples; not of `lazy_ratio`."""
        return fmean(sample.all_streaming[strategy] for sample in self.samples)

    @property
    def mean_shares(self) -> list[float]:
        """By layer, the share that `gates` gives it of the rise when every layer streams, averaged over samples."""
        return [fmean(share_S) for share_S in zip(*self.scores["gates"], strict=True)]

    @property
    def mean_head_shares(self) -> list[list[float]]:
        """As `mean_shares`, of KV heads: `shares[layer][kv_head]`.

        Raises:
            UserError: the profile has none.
        """
        mean = [math.fsum(share_S) / len(self.samples) for share_S in zip(*self._head_shares(), strict=True)]
        of_full = dict(zip(self.full_in_base, range(0, len(mean), self.kv_heads), strict=True))
        unscored = [0.0] * self.kv_heads
        return [
            mean[of_full[layer] : of_full[layer] + self.kv_heads] if layer in of_full else unscored
            for layer in range(self.num_layers)
        ]

    def predicted_rise(self, spec: HybridSpec) -> float:
        """The predicted rise of the loss on long-reach tokens, in nats: the sum of the `gates` shares of KV heads that stream."""
        by_layer = zip(self.mean_head_shares, spec.streaming_heads(self.kv_heads), strict=True)
        return math.fsum(share_G[head] for share_G, heads in by_layer for head in heads)

    @property
    def mean_sum_of_shares(self) -> float:
        """The rise when every layer streams as the shares of `gates` add up to it, averaged over samples."""
        return fmean(math.fsum(sample.scores["gates"]) for sample in self.samples)

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "LayerProfile":
        """
        Raises:
            UserError: the file cannot be read, or is not a valid layer profile.
        """
        profile = validated(cls, read_json(path, "layer profile"), str(path))
        for sample in profile.samples:
            check_sample(sample, profile.fingerprint.strategies, profile.num_layers, str(path))
        if not profile.samples:
            raise _invalid(str(path), "it has no samples")
        return profile


def _selection(strategy: str) -> Select:
    return most_often_lazy if strategy == "lazy_ratio" else smallest_rise


def validated(kind: type[_FromFile], values: object, where: str) -> _FromFile:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        raise _invalid(where, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


def check_sample(sample: SampleScores, strategies: Sequence[str], num_layers: int, where: str) -> None:
    for strategy in strategies:
        score_L = sample.scores.get(strategy, ())
        if len(score_L) != num_layers or not all(map(math.isfinite, score_L)):
            raise _invalid(where, f"sample {sample.id} lacks a finite {strategy} score for each of {num_layers} layers")
    if "gates" in strategies and [math.fsum(head_G) for head_G in sample.head_shares] != list(sample.scores["gates"]):
        raise _invalid(where, f"sample {sample.id}: the head_shares of its layers do not add up to their gates scores")


def _invalid(where: str, fault: str) -> UserError:
    return UserError(
        f"{where}: not a valid layer profile ({fault}). Fix: delete its folder and run again, which scores the layers again"
    )
