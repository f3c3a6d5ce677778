"""Numbers with their doubt: means over problems, majority votes, and differences between two models asked the same
problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """`standard_error` is None for a single value, which says nothing of its own spread."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """first - second, with a 95 % interval from `low` to `high`."""

    value: float
    standard_error: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Vote:
    """`right`: 1 if the most frequent answer is right, 0 if wrong; between tied answers the share of right ones.
    `tie`: there was one.
    """

    right: float
    tie: bool


@dataclass(frozen=True)
class TokenLoss:
    """Summed negative log-likelihood (nats) of a sample's answer tokens, and their number."""

    nll: float
    tokens: int


def mean_over_problems(values: Sequence[float]) -> Mean:
    """Mean and its standard error, from the spread between problems (ddof 1).

    With values that are shares of right samples this is avg@n: n samples of one problem are not independent of each
    other, problems are. With one sample a problem it is sqrt(p (1 - p) / (N - 1)).
    """
    n = len(values)
    return Mean(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None, n)


def majority_vote(answers: Sequence[tuple[str | None, bool]], equivalent: Callable[[str, str], bool]) -> Vote:
    """Vote over answers of one problem, each (extracted, correct), in the order of their samples.

    Equivalent answers (1/2, 0.5) are one candidate, which is right if its first answer is. No answer, no vote; if none
    voted the problem is wrong.
    """
    candidates: list[tuple[str, bool, int]] = []  # first answer, its verdict, votes
    for answer, correct in answers:
        if answer is None:
            continue
        for index, (first, verdict, votes) in enumerate(candidates):
            if answer == first or equivalent(first, answer):
                candidates[index] = (first, verdict, votes + 1)
                break
        else:
            candidates.append((answer, correct, 1))
    most = max((votes for _, _, votes in candidates), default=0)
    winners = [verdict for _, verdict, votes in candidates if votes == most]
    return Vote(fmean(winners) if winners else 0.0, tie=len(winners) > 1)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Difference of two mean accuracies (first - second) over the same problems, values in [0, 1] by problem.

    `value` and `standard_error` are the plain ones. The interval is Bonett and Price's (2012, doi
    10.3102/1076998611411915), taken over from paired yes-or-no answers to shares: two further problems are imagined,
    one won and one lost by the first model. So it keeps a width where both models agree on every problem and the
    standard error is 0.

    Raises:
        ValueError: the two were not asked the same problems.
    """
    differences = paired(first, second)
    plain = mean_over_problems(differences)
    widened = mean_over_problems([*differences, 1.0, -1.0])
    spread = math.sqrt(fmean((d - widened.value) ** 2 for d in [*differences, 1.0, -1.0]) / widened.n)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    return Difference(plain.value, plain.standard_error, max(-1.0, widened.value - reach), min(1.0, widened.value + reach), plain.n)


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    check_same_keys(first.keys(), second.keys())
    return [first[key] - second[key] for key in first]


def mean_loss(losses: Sequence[TokenLoss]) -> Mean:
    """Loss per token over all tokens, with the standard error of a ratio estimator over samples (Cochran, Sampling
    Techniques, 2.11).
    """
    return ratio([loss.nll for loss in losses], [loss.tokens for loss in losses])


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
    if mean.standard_error is None:
        return Difference(mean.value, None, -math.inf, math.inf, mean.n)
    reach = student_t(mean.n - 1) * mean.standard_error
    return Difference(mean.value, mean.standard_error, mean.value - reach, mean.value + reach, mean.n)


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
