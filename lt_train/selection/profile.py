"""The layer profile: one score per layer, strategy and sample, with its fingerprint; how it is computed, saved and loaded.

profile.json     the finished profile
samples.jsonl    a header, then one row for each scored sample: a killed run resumes at the next sample
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import append_json_line, drop_cut_line, read_json, read_json_lines, write_json
from lt_train.runtime.fingerprints import check_same
from lt_train.runtime.progress import show_progress
from lt_train.runtime.run_paths import LAYER_PROFILE
from lt_train.selection.calibration import samples_beyond_window
from lt_train.selection.chosen import heads_by_layer
from lt_train.selection.fingerprint import Fingerprint, Sizes, fingerprint
from lt_train.selection.gates import POINTS, check_sum_of_shares, gate_shares
from lt_train.selection.kl import mean_divergence
from lt_train.selection.lazy_ratio import lazy_ratios, most_often_lazy
from lt_train.selection.nll import nll_rise
from lt_train.selection.periodic import periodic_layers
from lt_train.selection.reach import reach_rise
from lt_train.selection.stability import Select, Stability, compare_halves
from lt_train.selection.token_losses import Variants, smallest_rise

if TYPE_CHECKING:
    from lt_train.dataset.examples import Example

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


@dataclass(frozen=True)
class Header:
    """The first row of `samples.jsonl`."""

    fingerprint: Fingerprint
    num_layers: int
    fitting: tuple[str, ...]
    started: str
    sliding_layers: tuple[int, ...] = ()


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
        profile = _validated(cls, read_json(path, "layer profile"), str(path))
        for sample in profile.samples:
            _check_sample(sample, profile.fingerprint.strategies, profile.num_layers, str(path))
        if not profile.samples:
            raise _invalid(str(path), "it has no samples")
        return profile


def profile_layers(
    model: HybridForCausalLM,
    examples: Sequence["Example"],
    hybrid: Hybrid,
    strategies: Sequence[str],
    *,
    out: Path | None = None,
    progress: bool = True,
) -> LayerProfile:
    """Score every layer of `model` on every calibration example by every strategy that scores the model.

    Args:
        model: a hybrid with the recipe's `scored_w_sink` and `w_recent` and any lazy layers. It is set to evaluation mode, and its
            weights require no gradients afterwards.
        hybrid: the recipe's hybrid part.
        strategies: names; `periodic` and `random` need no scores and are skipped.
        out: folder for `profile.json` and `samples.jsonl`, in which an interrupted run resumes.
        progress: show samples done, rate and time left on stderr.

    Raises:
        UserError: too many samples fit inside the window, a score is not finite, the shares of `gates` do not add up to the
            measured rise, or `out` holds another model's or data's scores.
    """
    sizes = Sizes(hybrid.scored_w_sink, hybrid.w_recent, hybrid.calibration.w_last, hybrid.calibration.long_reach_fraction)
    scored = tuple(strategy for strategy in SCORED if strategy in strategies)
    if (model.spec.w_sink, model.spec.w_recent) != (sizes.w_sink, sizes.w_recent):
        raise ValueError(f"the model's spec {model.spec} does not have the recipe's sizes {sizes}")
    usable, fitting = samples_beyond_window(examples, sizes.w_sink, sizes.w_recent)
    model.eval().requires_grad_(False)
    header = Header(
        fingerprint=fingerprint(model, examples, sizes, scored),
        num_layers=model.config.num_hidden_layers,
        fitting=tuple(example.id for example in fitting),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        sliding_layers=model.spec.sliding_layers,
    )
    samples: list[SampleScores] = []
    if out is not None:
        header, samples = _begin_or_resume(out / "samples.jsonl", header)
    with show_progress("scoring layers", done=len(samples), total=len(usable), shown=progress) as bar:
        for example in usable[len(samples) :]:
            samples.append(_score_sample(model, example, sizes, scored))
            if out is not None:
                append_json_line(out / "samples.jsonl", dataclasses.asdict(samples[-1]))
            bar.advance()
    profile = LayerProfile(
        header.fingerprint, header.num_layers, tuple(samples), header.fitting, header.started, header.sliding_layers
    )
    if "gates" in scored:
        check_sum_of_shares(profile.mean_sum_of_shares, profile.mean_all_streaming("gates"), len(samples))
    if out is not None:
        profile.save(out / LAYER_PROFILE)
    return profile


def _score_sample(model: HybridForCausalLM, example: "Example", sizes: Sizes, strategies: Sequence[str]) -> SampleScores:
    scores: dict[str, list[float]] = {}
    all_streaming: dict[str, float] = {}
    shares = None
    if "gates" in strategies:
        shares = gate_shares(model, example.prompt_ids, example.answer_ids, sizes.long_reach_share)
        scores["gates"], all_streaming["gates"] = shares.layers, shares.measured_rise
    if {"reach", "nll", "kl"} & set(strategies):
        variants = Variants(model, example.prompt_ids, example.answer_ids)
        if "reach" in strategies or "nll" in strategies:
            losses = variants.losses()
        if "reach" in strategies:
            scores["reach"], all_streaming["reach"] = reach_rise(losses, sizes.long_reach_share)
        if "nll" in strategies:
            scores["nll"], all_streaming["nll"] = nll_rise(losses)
        if "kl" in strategies:
            scores["kl"], all_streaming["kl"] = mean_divergence(variants.divergences())
    if "lazy_ratio" in strategies:
        scores["lazy_ratio"] = lazy_ratios(model, example.input_ids, sizes)
    for strategy in scores.keys() - {"gates"}:
        of_full = dict(zip(model.spec.full_in_base, scores[strategy], strict=True))
        scores[strategy] = [of_full.get(layer, 0.0) for layer in range(model.spec.num_layers)]
    for strategy, score_L in scores.items():
        if not all(map(math.isfinite, score_L)):
            raise UserError(
                f"model.base: {strategy} of sample {example.id} is not finite in {model.dtype}, so layers cannot be ranked. "
                "Fix: set model.dtype to fp32; if that does not help, the base's weights are damaged"
            )
    return SampleScores(
        id=example.id,
        tokens=len(example),
        scores={name: tuple(score_L) for name, score_L in scores.items()},
        all_streaming=all_streaming,
        head_shares=() if shares is None else shares.heads,
        sum_of_shares=None if shares is None else math.fsum(shares.layers),
        gate_points=len(POINTS) if shares is None else shares.points,
    )


def _selection(strategy: str) -> Select:
    return most_often_lazy if strategy == "lazy_ratio" else smallest_rise


def _begin_or_resume(path: Path, header: Header) -> tuple[Header, list[SampleScores]]:
    """Write the header to a new file, or read header and rows of an existing one.

    Raises:
        UserError: the file is of another model, other data or other settings, or has a damaged row.
    """
    drop_cut_line(path)
    rows = list(read_json_lines(path)) if path.exists() else []
    if not rows:
        append_json_line(path, dataclasses.asdict(header))
        return header, []
    where, first = rows[0]
    begun = _validated(Header, first, where)
    check_same(
        dataclasses.asdict(begun.fingerprint),
        dataclasses.asdict(header.fingerprint),
        f"{path}: these scores have another fingerprint",
        "give this run another name, or delete that folder to score again",
    )
    samples = [_validated(SampleScores, row, where) for where, row in rows[1:]]
    for (where, _), sample in zip(rows[1:], samples, strict=True):
        _check_sample(sample, header.fingerprint.strategies, header.num_layers, where)
    return begun, samples


def _validated(kind: type[_FromFile], values: object, where: str) -> _FromFile:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        raise _invalid(where, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


def _check_sample(sample: SampleScores, strategies: Sequence[str], num_layers: int, where: str) -> None:
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
