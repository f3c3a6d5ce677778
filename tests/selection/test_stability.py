from statistics import fmean

import numpy as np
import pytest

from lt_train.selection.ranking import smallest_rise
from lt_train.selection.stability import LARGEST_LOSS, Stability, compare_halves, describe_stability
from tests.support.gates_profiles import profile_of

TRUE_COSTS = np.linspace(0.0, 1.0, 12)


def compared(costs: np.ndarray, n_layers: int = 6) -> Stability:
    return compare_halves(costs.tolist(), costs.tolist(), smallest_rise, n_layers)


def drawn(samples: int, spread: float, seed: int) -> np.ndarray:
    """Costs `[sample, layer]` that differ by `spread` from sample to sample."""
    return TRUE_COSTS + spread * np.random.default_rng(seed).standard_normal((samples, len(TRUE_COSTS)))


def test_samples_that_agree_choose_alike_and_lose_nothing():
    found = compared(np.tile(TRUE_COSTS, (4, 1)))
    assert (found.same, found.n_layers, found.by_chance, found.lost) == (6, 6, 3.0, 0.0)
    assert found.is_steady
    assert list(describe_stability("reach", found)) == [
        "reach: the halves of the samples choose 6 of 6 layers alike (3.0 by chance)"
    ]


def test_halves_are_the_even_and_the_odd_samples():
    opposite = np.stack([TRUE_COSTS, TRUE_COSTS[::-1], TRUE_COSTS, TRUE_COSTS[::-1], TRUE_COSTS])
    assert compared(opposite).same == 0


def test_layers_that_cost_the_same_need_no_further_samples():
    assert compared(np.zeros((3, 12))).is_steady


@pytest.mark.parametrize(("samples", "spread"), [(8, 0.5), (16, 1.0), (32, 1.0)])
def test_the_estimate_is_what_a_choice_on_all_samples_loses_on_average(samples, spread):
    estimated, lost = [], []
    gain = 6 * TRUE_COSTS.mean() - TRUE_COSTS[:6].sum()
    for seed in range(400):
        costs = drawn(samples, spread, seed)
        estimated.append(compared(costs).lost)
        chosen = smallest_rise(costs.tolist(), 6)
        lost.append((TRUE_COSTS[list(chosen)].sum() - TRUE_COSTS[:6].sum()) / gain)
    assert fmean(estimated) == pytest.approx(fmean(lost), rel=0.35)


def test_too_few_samples_are_a_warning_with_a_number_that_does():
    draws = [compared(drawn(16, 1.0, seed)) for seed in range(40)]
    few = sorted(draws, key=lambda found: found.lost)[20]
    assert not few.is_steady
    overlap, warning = describe_stability("nll", few)
    assert f"{few.same} of 6 layers alike" in overlap
    assert warning.startswith("warning: nll: 16 samples are too few for the spread between them")
    assert f"raise hybrid.calibration.samples; about {few.samples_needed} would do" in warning
    enough = fmean(compared(drawn(few.samples_needed, 1.0, seed)).lost for seed in range(40))
    assert enough == pytest.approx(LARGEST_LOSS, rel=0.3)


def test_a_single_sample_is_a_warning():
    (warning,) = describe_stability("gates", None)
    assert warning.startswith("warning: gates: one sample does not show")


def test_the_choice_of_kv_heads_is_compared_by_halves_too():
    opposite = [[[0.9, 0.0], [0.1, 0.2]], [[0.0, 0.9], [0.1, 0.2]]]
    found = profile_of(opposite).stability_of_heads(2)
    assert found.overlap == "the halves of the samples choose 1 of 2 KV heads alike (1.0 by chance)"
    assert profile_of(opposite[:1]).stability_of_heads(2) is None
