"""Means over seeds, and differences between models that were made with the same seeds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation.scores import LossScores, difference
from lt_train.evaluation.seeds import difference_over_seeds, mean_over_seeds
from lt_train.evaluation.statistics import mean_over_problems
from tests.support.made_runs import ANSWERS, loss_scores, scores_of_answers

BASE = (10.0, 12.0, 14.0, 16.0)
NOISE = st.lists(st.floats(-1, 1), min_size=4, max_size=4)


def above_base(*rises: float) -> LossScores:
    return loss_scores([loss + rise for loss, rise in zip(BASE, rises, strict=True)])


def test_one_seed_is_what_it_is_without_seeds() -> None:
    first, second = above_base(0.1, 0.3, 0.2, 0.1), above_base(0.0, 0.0, 0.1, -0.1)
    alone = mean_over_seeds([first])
    assert (alone.value, alone.standard_error, alone.interval, alone.spread) == (
        first.loss,
        first.standard_error,
        first.interval,
        None,
    )
    expected, found = difference(first, second), difference_over_seeds([first], [second])
    assert found.interval is not None
    assert (found.value, found.interval.low, found.interval.high) == (expected.value, expected.low, expected.high)


def test_seeds_that_agree_leave_the_error_over_samples() -> None:
    first, second = above_base(0.1, 0.3, 0.2, 0.1), above_base(0.0, 0.0, 0.1, -0.1)
    once, thrice = difference(first, second), difference_over_seeds([first] * 3, [second] * 3)
    assert thrice.spread == pytest.approx(0, abs=1e-12) and thrice.interval is not None
    assert (thrice.value, thrice.interval.low, thrice.interval.high) == pytest.approx((once.value, once.low, once.high))


def test_samples_that_agree_leave_students_interval_over_seeds() -> None:
    """Every sample rises alike, by 0.01, 0.02 and 0.03 nats per token: t of 2 degrees of freedom is 4.303."""
    seeds = [above_base(rise, rise, rise, rise) for rise in (0.1, 0.2, 0.3)]
    found = difference_over_seeds(seeds, [above_base(0, 0, 0, 0)] * 3)
    assert found.value == pytest.approx(0.02) and found.spread == pytest.approx(0.01)
    assert found.interval is not None
    reach = 4.3027 * 0.01 / 3**0.5
    assert (found.interval.low, found.interval.high) == pytest.approx((0.02 - reach, 0.02 + reach), abs=1e-5)


@given(st.lists(NOISE, min_size=2, max_size=4))
def test_the_interval_is_no_narrower_than_that_over_samples_or_over_seeds(noise: list[list[float]]) -> None:
    seeds = [above_base(*rises) for rises in noise]
    found, samples = difference_over_seeds(seeds, [above_base(0, 0, 0, 0)] * len(seeds)), mean_over_seeds(seeds)
    assert found.interval is not None and samples.interval is not None
    averaged = [sum(rises) / len(noise) for rises in zip(*noise, strict=True)]
    over_samples = difference(above_base(*averaged), above_base(0, 0, 0, 0))
    width = found.interval.high - found.interval.low
    assert width >= over_samples.high - over_samples.low - 1e-9


def test_differences_are_paired_within_a_seed() -> None:
    """The seeds' own samples differ by nats; each seed's difference is 0.01."""
    harder = [loss_scores([shift + loss for loss in BASE]) for shift in (0, 20, 40)]
    hybrids = [loss_scores([shift + loss + 0.1 for loss in BASE]) for shift in (0, 20, 40)]
    found = difference_over_seeds(hybrids, harder)
    assert found.interval is not None and found.interval.low == pytest.approx(0.01) == pytest.approx(found.interval.high)
    spread = mean_over_seeds(hybrids).spread
    assert spread is not None and spread > 1


def test_seeds_may_have_samples_of_their_own() -> None:
    def with_other_samples(scores: LossScores) -> LossScores:
        return replace(scores, by_sample={f"other {name}": loss for name, loss in scores.by_sample.items()})

    hybrid, base = above_base(0.1, 0.1, 0.1, 0.1), above_base(0, 0, 0, 0)
    found = difference_over_seeds([hybrid, with_other_samples(hybrid)], [base, with_other_samples(base)])
    assert found.value == pytest.approx(0.01)
    with pytest.raises(ValueError, match="not the same problems"):
        difference_over_seeds([hybrid, hybrid], [base, with_other_samples(base)])


def test_answers_are_averaged_by_problem() -> None:
    base, converted = (scores_of_answers(ANSWERS[variant], {}, 4) for variant in ("base", "converted"))
    mean = mean_over_seeds([base, converted])
    assert mean.value == pytest.approx((0.75 + 0.25) / 2) and mean.spread == pytest.approx(0.5 / 2**0.5)
    averaged = [(base.by_problem[problem] + converted.by_problem[problem]) / 2 for problem in base.by_problem]
    assert mean.standard_error == mean_over_problems(averaged).standard_error
    assert mean.interval is not None and (mean.interval.low, mean.interval.high) == (0, 1)  # t of one degree of freedom: 12.7
    apart = difference_over_seeds([converted, base], [base, converted]).interval
    assert apart is not None and (apart.low, apart.high) == (-1, 1)
    found = difference_over_seeds([converted, converted], [base, base])
    once = difference(converted, base)
    assert found.interval is not None and (found.interval.low, found.interval.high) == pytest.approx((once.low, once.high))
