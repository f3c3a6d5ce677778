"""Numbers with their doubt: means over problems, pass@k, majority votes, lengths, and differences between two models asked
the same problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np

CONFIDENCE = 0.95

RESAMPLES = 10_000
"""Of a bootstrap: the ends of a 95 % interval then waver by about a hundredth of its width."""

SIGN_FLIPS = 20_000
"""Of a permutation test, where there are too many to try all: a p of 0.05 then wavers by 0.0015."""

ALL_FLIPS_UP_TO = 16
"""Differences whose 2^n signs are all tried."""

AT_ONCE = 4_000_000
"""Random numbers held in memory at a time."""


@dataclass(frozen=True)
class Mean:
    """`standard_error` is None for a single value, which says nothing of its own spread."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """first - second, with a 95 % interval from `low` to `high`.

    `p`: how often a difference at least so large, in either direction, would come about between equal models; None where no test
    was made. `test`: how it was found.
    """

    value: float
    standard_error: float | None
    low: float
    high: float
    n: int
    p: float | None = None
    test: Literal["mcnemar", "permutation"] | None = None


@dataclass(frozen=True)
class Interval:
    """Of 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class Vote:
    """`right`: the score of the most frequent answer, 1 if right and 0 if wrong; between tied answers their mean.
    `tie`: there was one.
    """

    right: float
    tie: bool


@dataclass(frozen=True)
class Lengths:
    """How long answers are, in tokens: mean, deciles and quartiles, longest, of so many `samples`."""

    samples: int
    mean: float
    decile_1: float
    quartile_1: float
    median: float
    quartile_3: float
    decile_9: float
    longest: float


@dataclass(frozen=True)
class TokenLoss:
    """Summed negative log-likelihood (nats) of a sample's answer tokens, or their summed divergence; and their number."""

    nll: float
    tokens: int


def mean_over_problems(values: Sequence[float]) -> Mean:
    """Mean and its standard error, from the spread between problems (ddof 1).

    With values that are shares of right samples this is avg@n: n samples of one problem are not independent of each
    other, problems are. With one sample a problem it is sqrt(p (1 - p) / (N - 1)).
    """
    n = len(values)
    return Mean(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None, n)


def accuracy_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """95 % interval of a mean score over problems, values in [0, 1]; None for fewer than two problems.

    Wilson's where every problem was simply right or wrong: recommended for few problems, and as good as any for many (Brown, Cai
    and DasGupta 2001, doi 10.1214/ss/1009213286). It keeps a width where none or all are right, and where one is right does not
    reach down to 0, both of which a bootstrap gets wrong. Wilson's also where all problems scored the same share: no score in
    [0, 1] has a larger variance than a yes-or-no one of the same mean, so it is at least wide enough. The bootstrap for others.
    """
    if len(values) < 2:
        return None
    if set(values) <= {0, 1} or len(set(values)) == 1:
        return wilson(fmean(values), len(values))
    return bootstrap_interval(values, seed)


def wilson(share: float, n: int) -> Interval:
    """Interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends it touches 0 and 1 exactly, but for rounding.
    return Interval(0.0 if share == 0 else centre - reach, 1.0 if share == 1 else centre + reach)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean over problems (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3).

    Where all values are equal it has no width, which says more of the method than of the model.
    """
    n = len(values)
    generator = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    rows = max(1, AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = np.concatenate([array[generator.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def pass_at_k(right: int, n: int, k: int) -> float:
    """Chance that at least one of k samples is right, of n samples of which `right` are: the unbiased estimator
    1 - C(n - right, k) / C(n, k) of arXiv 2107.03374, exact.

    Raises:
        ValueError: k is larger than n, which nothing is known of, or below 1.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {right} right: k must be from 1 to the number of samples")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Mean:
    """pass@k over problems, each (right samples, all samples)."""
    return mean_over_problems([pass_at_k(right, n, k) for right, n in counts])


def lengths_of(tokens: Sequence[int]) -> Lengths | None:
    """None where there are no answers. Quantiles are interpolated linearly."""
    if not tokens:
        return None
    array = np.asarray(tokens, dtype=np.float64)
    quantiles = np.quantile(array, [0.1, 0.25, 0.5, 0.75, 0.9, 1])
    return Lengths(len(tokens), float(array.mean()), *map(float, quantiles))


def majority_vote(answers: Sequence[tuple[str | None, float]], equivalent: Callable[[str, str], bool]) -> Vote:
    """Vote over answers of one problem, each (extracted, score), in the order of their samples.

    Equivalent answers (1/2, 0.5) are one candidate, which has the score of its first answer. No answer, no vote; if none
    voted the problem is wrong.
    """
    candidates: list[tuple[str, float, int]] = []  # first answer, its score, votes
    for answer, score in answers:
        if answer is None:
            continue
        for index, (first, first_score, votes) in enumerate(candidates):
            if answer == first or equivalent(first, answer):
                candidates[index] = (first, first_score, votes + 1)
                break
        else:
            candidates.append((answer, score, 1))
    most = max((votes for _, _, votes in candidates), default=0)
    winners = [score for _, score, votes in candidates if votes == most]
    return Vote(fmean(winners) if winners else 0.0, tie=len(winners) > 1)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], seed: int = 0) -> Difference:
    """Difference of two mean scores (first - second) over the same problems, values in [0, 1] by problem.

    `value` and `standard_error` are the plain ones. The interval is Bonett and Price's (2012, doi
    10.3102/1076998611411915), taken over from paired yes-or-no answers to shares: two further problems are imagined,
    one won and one lost by the first model. So it keeps a width where both models agree on every problem and the
    standard error is 0.

    `p` is McNemar's exact one where every problem was simply right or wrong, else that of a paired permutation test.

    Args:
        seed: of the permutations.

    Raises:
        ValueError: the two were not asked the same problems.
    """
    differences = paired(first, second)
    plain = mean_over_problems(differences)
    widened = mean_over_problems([*differences, 1.0, -1.0])
    spread = math.sqrt(fmean((d - widened.value) ** 2 for d in [*differences, 1.0, -1.0]) / widened.n)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    yes_or_no = {*first.values(), *second.values()} <= {0, 1}
    return Difference(
        plain.value,
        plain.standard_error,
        low=max(-1.0, widened.value - reach),
        high=min(1.0, widened.value + reach),
        n=plain.n,
        p=mcnemar_p(differences.count(1), differences.count(-1)) if yes_or_no else sign_flip_p(differences, seed),
        test="mcnemar" if yes_or_no else "permutation",
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: the binomial test of the problems that one model alone got right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, wins) for wins in range(fewer + 1)) / 2**n)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a paired permutation test: between equal models each difference is as likely as its opposite.

    Exact for up to 16 differences other than 0. Beyond, from random signs, counting the found ones among them (Phipson and
    Smyth 2010, doi 10.2202/1544-6115.1585), so that it is never 0.
    """
    sizes = np.sort(np.abs([difference for difference in differences if difference != 0]))  # sorted: the order has no say
    found = abs(math.fsum(differences)) - 1e-9  # sums that differ in their last bits only are equal
    n = len(sizes)
    if n <= ALL_FLIPS_UP_TO:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums + size, sums - size])
        return float(np.mean(np.abs(sums) >= found))
    generator = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // n)
    as_large = 0
    for start in range(0, SIGN_FLIPS, rows):
        signs = generator.integers(0, 2, (min(rows, SIGN_FLIPS - start), n), dtype=np.int8) * 2.0 - 1
        as_large += int(np.count_nonzero(np.abs(signs @ sizes) >= found))
    return (as_large + 1) / (SIGN_FLIPS + 1)


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    check_same_keys(first.keys(), second.keys())
    return [first[key] - second[key] for key in first]


def mean_loss(losses: Sequence[TokenLoss]) -> Mean:
    """Loss per token over all tokens, with the standard error of a ratio estimator over samples (Cochran, Sampling
    Techniques, 2.11).
    """
    return ratio([loss.nll for loss in losses], [loss.tokens for loss in losses])


def student_interval(mean: Mean) -> Interval | None:
    """95 % interval of a mean by Student's t; None where a single value tells nothing of the spread."""
    if mean.standard_error is None:
        return None
    reach = student_t(mean.n - 1) * mean.standard_error
    return Interval(mean.value - reach, mean.value + reach)


def paired_loss_difference(first: Mapping[str, TokenLoss], second: Mapping[str, TokenLoss]) -> Difference:
    """Difference of two losses per token (first - second) over the same samples; interval by Student's t over samples.

    Raises:
        ValueError: the samples or their numbers of tokens are not the same.
    """
    check_same_keys(first.keys(), second.keys())
    for key in first:
        if first[key].tokens != second[key].tokens:
            raise ValueError(f"sample {key}: {first[key].tokens} answer tokens in one, {second[key].tokens} in the other")
    mean = ratio([first[key].nll - second[key].nll for key in first], [loss.tokens for loss in first.values()])
    span = student_interval(mean) or Interval(-math.inf, math.inf)
    return Difference(mean.value, mean.standard_error, span.low, span.high, mean.n)


def ratio(values: Sequence[float], sizes: Sequence[int]) -> Mean:
    """sum(values) / sum(sizes), with the standard error over its n pairs."""
    n, total = len(values), sum(sizes)
    mean = math.fsum(values) / total
    if n == 1:
        return Mean(mean, None, 1)
    squares = math.fsum((value - mean * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return Mean(mean, math.sqrt(squares * n / (n - 1)) / total, n)


def student_t(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: Abramowitz and Stegun 26.7.5; exact for 1 and 2 degrees of freedom, to
    0.01 from 3 on.
    """
    if freedom == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    if freedom == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def check_same_keys(first: Set[str], second: Set[str]) -> None:
    if not first or first != second:
        only_one = sorted(first ^ second)
        raise ValueError(
            f"not the same problems: {len(first)} and {len(second)}, of which {len(only_one)} are in one only {only_one[:5]}"
        )
