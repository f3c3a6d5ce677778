"""Numbers with their uncertainty: means over problems, pass@k, majority votes, lengths, and differences between two models on the
same problems.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np

CONFIDENCE = 0.95

RESAMPLES = 10_000
"""Of a bootstrap: the ends of a 95 % interval then vary by about a hundredth of its width."""

SIGN_FLIPS = 20_000
"""Of a permutation test, where there are too many to try all: a p of 0.05 then varies by 0.0015."""

ALL_FLIPS_UP_TO = 16
"""Differences whose 2^n signs are all tried."""

AT_ONCE = 4_000_000
"""Random numbers held in memory at a time."""


@dataclass(frozen=True)
class Mean:
    """`standard_error` is None for a single value, which has no spread."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """first - second, with a 95 % interval from `low` to `high`.

    `p`: probability of a difference at least this large, in either direction, between equal models; None where no test was made.
    `test`: the test.
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
    """An interval of 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class Vote:
    """`score`: that of the most frequent answer, 1 if correct and 0 if incorrect; between tied answers their mean.
    `tie`: there was one.
    """

    score: float
    tie: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens per answer over `samples` answers: mean, deciles and quartiles, longest."""

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

    With values that are fractions of correct samples this is avg@n: n samples of one problem are not independent of each
    other, problems are. With one sample a problem it is sqrt(p (1 - p) / (N - 1)).
    """
    n = len(values)
    return Mean(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None, n)


def accuracy_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """95 % interval of a mean score over problems, values in [0, 1]; None for fewer than two problems.

    Wilson's where every problem is either correct or incorrect: recommended for few problems, and as good as any for many (Brown,
    Cai and DasGupta 2001, doi 10.1214/ss/1009213286). It keeps a width where none or all are correct, and excludes 0 where one is;
    a bootstrap does neither. Wilson's also where all problems have the same score: no score in [0, 1] has a larger variance than a
    binary one of the same mean, so it is at least wide enough. The bootstrap for others.
    """
    if len(values) < 2:
        return None
    if set(values) <= {0, 1} or len(set(values)) == 1:
        return wilson(fmean(values), len(values))
    return bootstrap_interval(values, seed)


def wilson(fraction: float, n: int) -> Interval:
    """Interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    # Its ends are exactly 0 and 1 there, up to rounding.
    return Interval(0.0 if fraction == 0 else centre - reach, 1.0 if fraction == 1 else centre + reach)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean over problems (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3).

    Where all values are equal it has no width, and is no estimate of the uncertainty.
    """
    n = len(values)
    generator = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    rows = max(1, AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = np.concatenate([array[generator.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Probability that at least one of k samples is correct, from n samples of which `correct` are: the unbiased estimator
    1 - C(n - correct, k) / C(n, k) of arXiv 2107.03374, exact.

    Raises:
        ValueError: k is larger than n, so that there is no estimate, or below 1.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {correct} correct: k must be from 1 to the number of samples")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Mean:
    """pass@k over problems, each (correct samples, all samples)."""
    return mean_over_problems([pass_at_k(correct, n, k) for correct, n in counts])


def lengths_of(tokens: Sequence[int]) -> Lengths | None:
    """Quantiles of lengths; None where there are no answers. Quantiles are interpolated linearly."""
    if not tokens:
        return None
    array = np.asarray(tokens, dtype=np.float64)
    quantiles = np.quantile(array, [0.1, 0.25, 0.5, 0.75, 0.9, 1])
    return Lengths(len(tokens), float(array.mean()), *map(float, quantiles))


def majority_vote(answers: Sequence[tuple[str | None, float]], equivalent: Callable[[str, str], bool]) -> Vote:
    """Vote over answers of one problem, each (extracted, score of the answer); their order does not matter.

    Equivalent answers (1/2, 0.5) are one candidate, which has the score of its most frequent spelling, the best that any sample
    with this spelling got. No answer, no vote; if none voted the problem is incorrect.
    """
    spellings = Counter(answer for answer, _ in answers if answer is not None)
    candidates: list[tuple[str, int]] = []  # most frequent spelling, votes
    for spelling, count in sorted(spellings.items(), key=lambda item: (-item[1], item[0])):
        for index, (first, votes) in enumerate(candidates):
            if equivalent(first, spelling):
                candidates[index] = (first, votes + count)
                break
        else:
            candidates.append((spelling, count))
    most = max((votes for _, votes in candidates), default=0)
    winners = [max(score for answer, score in answers if answer == first) for first, votes in candidates if votes == most]
    return Vote(fmean(winners) if winners else 0.0, tie=len(winners) > 1)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], seed: int = 0) -> Difference:
    """Difference of two mean scores (first - second) over the same problems, values in [0, 1] by problem.

    `value` and `standard_error` are the plain ones. The interval is Bonett and Price's (2012, doi
    10.3102/1076998611411915), extended from paired binary answers to scores: two further problems are assumed, one won and one
    lost by the first model, by the largest difference of a problem, or by 1 where there is none. So it keeps a width where both
    models agree on every problem and the standard error is 0, and small differences of graded answers are not lost in it.

    `p` is McNemar's exact one where every problem is either correct or incorrect, else that of a paired permutation test.

    Args:
        seed: of the permutations.

    Raises:
        ValueError: the two are not of the same problems.
    """
    differences = paired(first, second)
    plain = mean_over_problems(differences)
    largest = max(map(abs, differences)) or 1.0
    widened = mean_over_problems(further := [*differences, largest, -largest])
    spread = math.sqrt(fmean((d - widened.value) ** 2 for d in further) / widened.n)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    binary = {*first.values(), *second.values()} <= {0, 1}
    return Difference(
        plain.value,
        plain.standard_error,
        low=max(-1.0, widened.value - reach),
        high=min(1.0, widened.value + reach),
        n=plain.n,
        p=mcnemar_p(differences.count(1), differences.count(-1)) if binary else sign_flip_p(differences, seed),
        test="mcnemar" if binary else "permutation",
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: the binomial test of the problems that one model alone solved."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, wins) for wins in range(fewer + 1)) / 2**n)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a paired permutation test: between equal models each difference is as likely as its opposite.

    Exact for up to 16 differences other than 0. Beyond, from random signs, counting the observed ones among them (Phipson and
    Smyth 2010, doi 10.2202/1544-6115.1585), so that it is never 0.
    """
    sizes = np.sort(np.abs([difference for difference in differences if difference != 0]))  # sorted: the order must not matter
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
    """95 % interval of a mean by Student's t; None for a single value, which has no spread."""
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
