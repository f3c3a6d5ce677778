"""Scores of one way to make a model, repeated with several seeds: their mean, and differences paired within each seed.

Two things vary: the samples on which a model is measured, and the seed with which it was made. An interval joins both: that over
samples, of each sample's mean over the seeds, and Student's t over the seeds' means. Their half-widths are joined as the root of
the sum of their squares (Zou and Donner 2008, doi 10.1002/sim.3095), so it is at least as wide as either. Where every seed also
draws its own samples, their spread is in both, and the interval is wider than it need be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lt_train.evaluation.scores import AnswerScores, LossScores, Scores, difference
from lt_train.evaluation.statistics import (
    Difference,
    Interval,
    Mean,
    TokenLoss,
    accuracy_interval,
    mean_loss,
    mean_over_problems,
    paired_difference,
    paired_loss_difference,
    student_interval,
    student_t,
)

UNBOUNDED = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds.

    Attributes:
        standard_error: over samples; None for a single one.
        spread: standard deviation between seeds; None for one seed.
        interval: of 95 % confidence, over samples and seeds; None for a single sample.
    """

    value: float
    standard_error: float | None
    spread: float | None
    interval: Interval | None


def mean_over_seeds(scores: Sequence[Scores]) -> SeedMean:
    """The mean of scores of one evaluation, one for each seed."""
    if len(scores) == 1:
        return SeedMean(scores[0].mean.value, scores[0].mean.standard_error, None, scores[0].interval)
    if isinstance(scores[0], AnswerScores):
        answers = list(_answers_by_problem(scores).values())
        over_samples, span, within = mean_over_problems(answers), accuracy_interval(answers), Interval(0, 1)
    else:
        over_samples = mean_loss(list(_losses_by_sample(scores).values()))
        span, within = student_interval(over_samples), UNBOUNDED
    return _joined([each.mean.value for each in scores], over_samples, span, within)


def difference_over_seeds(first: Sequence[Scores], second: Sequence[Scores]) -> SeedMean:
    """first - second, paired within each seed by problem or sample.

    Raises:
        ValueError: those of a seed are of different kinds, benchmarks or problems, or count truncated answers differently.
    """
    by_seed = [difference(one, other) for one, other in zip(first, second, strict=True)]
    if len(by_seed) == 1:
        (only,) = by_seed
        return SeedMean(only.value, only.standard_error, None, Interval(only.low, only.high))
    found: Difference
    if isinstance(first[0], AnswerScores):
        found, within = paired_difference(_answers_by_problem(first), _answers_by_problem(second)), Interval(-1, 1)
    else:
        found, within = paired_loss_difference(_losses_by_sample(first), _losses_by_sample(second)), UNBOUNDED
    over_samples = Mean(found.value, found.standard_error, found.n)
    return _joined([each.value for each in by_seed], over_samples, Interval(found.low, found.high), within)


def _joined(by_seed: Sequence[float], over_samples: Mean, span: Interval | None, within: Interval) -> SeedMean:
    """within: the values that there are."""
    value, spread = fmean(by_seed), stdev(by_seed)
    over_seeds = student_t(len(by_seed) - 1) * spread / math.sqrt(len(by_seed))
    interval = None
    if span is not None:
        below, above = over_samples.value - span.low, span.high - over_samples.value
        low, high = value - math.hypot(below, over_seeds), value + math.hypot(above, over_seeds)
        interval = Interval(max(low, within.low), min(high, within.high))
    return SeedMean(value, over_samples.standard_error, spread, interval)


def _answers_by_problem(scores: Sequence[Scores]) -> Mapping[str, float]:
    """Mean score of each problem over the seeds that have it."""
    found: dict[str, list[float]] = {}
    for each in scores:
        assert isinstance(each, AnswerScores)
        for problem, score in each.by_problem.items():
            found.setdefault(problem, []).append(score)
    return {problem: fmean(values) for problem, values in found.items()}


def _losses_by_sample(scores: Sequence[Scores]) -> Mapping[str, TokenLoss]:
    """Sums of each sample's losses and tokens over the seeds that have it."""
    found: dict[str, TokenLoss] = {}
    for each in scores:
        assert isinstance(each, LossScores)
        for sample, loss in each.by_sample.items():
            before = found.get(sample, TokenLoss(0.0, 0))
            found[sample] = TokenLoss(before.nll + loss.nll, before.tokens + loss.tokens)
    return found
