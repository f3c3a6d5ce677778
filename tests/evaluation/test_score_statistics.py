import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation import statistics
from lt_train.evaluation.statistics import (
    Interval,
    Lengths,
    TokenLoss,
    accuracy_interval,
    bootstrap_interval,
    lengths_of,
    majority_vote,
    mcnemar_p,
    mean_loss,
    mean_over_problems,
    mean_pass_at_k,
    paired_difference,
    paired_loss_difference,
    pass_at_k,
    sign_flip_p,
    student_interval,
    student_t,
    wilson,
)

SHARES = st.lists(st.integers(0, 8).map(lambda correct: correct / 8), min_size=2, max_size=30)


def equal_fractions(first: str, second: str) -> bool:
    return Fraction(first) == Fraction(second)


def test_the_error_of_one_sample_a_problem_is_the_binomial_one() -> None:
    mean = mean_over_problems([1.0] * 16 + [0.0] * 14)
    assert mean.value == pytest.approx(16 / 30)
    assert mean.standard_error == pytest.approx(math.sqrt(16 / 30 * 14 / 30 / 29))
    assert mean.n == 30


def test_the_error_of_many_samples_is_the_spread_between_problems() -> None:
    mean = mean_over_problems([0.25, 0.5, 1.0])
    assert mean.value == pytest.approx(7 / 12)
    assert mean.standard_error == pytest.approx(math.sqrt((16 + 1 + 25) / 144 / 2 / 3))


def test_a_single_problem_has_no_standard_error() -> None:
    assert mean_over_problems([1.0]).standard_error is None


@given(SHARES)
def test_asking_the_same_problems_four_times_over_halves_the_error_and_keeps_the_mean(values: list[float]) -> None:
    once, four_times = mean_over_problems(values), mean_over_problems(values * 4)
    n = len(values)
    assert four_times.value == pytest.approx(once.value)
    ratio = math.sqrt((n - 1) / (4 * n - 1))
    assert four_times.standard_error == pytest.approx(once.standard_error * ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "score", "tie"),
    [
        ([("5", True), ("6", False), ("5", True)], 1.0, False),
        ([("6", False), ("6", False), ("5", True)], 0.0, False),
        ([("1/2", True), ("6", False), ("2/4", True), ("6", False), ("3/6", True)], 1.0, False),
        ([("5", True), ("6", False)], 0.5, True),
        ([("5", True), ("6", False), ("7", False)], 1 / 3, True),
        ([("7", False), ("6", False)], 0.0, True),
        ([("5", True), (None, False), (None, False), (None, False)], 1.0, False),
        ([(None, False), (None, False)], 0.0, False),
    ],
)
def test_the_majority_of_equivalent_answers_decides_and_ties_are_shared(
    answers: list[tuple[str | None, bool]], score: float, tie: bool
) -> None:
    vote = majority_vote(answers, equal_fractions)
    assert vote.score == pytest.approx(score)
    assert vote.tie is tie


@given(st.permutations([("1/2", 1.0), ("2/4", 1.0), ("1/2", 0.0), ("6", 0.0), ("6", 0.0), ("7", 0.0), (None, 0.0)]))
def test_a_vote_does_not_depend_on_the_order_of_the_answers(answers: list[tuple[str | None, float]]) -> None:
    """One sample that gave 1/2 was not judged: what is correct does not depend on which sample gave it."""
    vote = majority_vote(answers, equal_fractions)
    assert (vote.score, vote.tie) == (1.0, False)


def test_the_paired_interval_is_that_of_bonett_and_price() -> None:
    # 20 problems: 9 both correct, 5 both incorrect, 5 only the first, 1 only the second. By the formula of the paper
    # p12 = (5+1)/22, p21 = (1+1)/22: 4/22 ± 1.959964 * sqrt((8/22 - (4/22)²) / 22).
    first = [1.0] * 9 + [0.0] * 5 + [1.0] * 5 + [0.0]
    second = [1.0] * 9 + [0.0] * 5 + [0.0] * 5 + [1.0]
    found = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    reach = 1.959964 * math.sqrt((8 / 22 - (4 / 22) ** 2) / 22)
    assert found.value == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(math.sqrt((6 - 20 * 0.2**2) / 19 / 20))
    assert (found.low, found.high) == (pytest.approx(4 / 22 - reach, abs=1e-6), pytest.approx(4 / 22 + reach, abs=1e-6))


def test_two_models_that_agree_everywhere_are_still_not_known_to_be_equal() -> None:
    few = paired_difference(dict.fromkeys("abcdefghij", 1.0), dict.fromkeys("abcdefghij", 1.0))
    many = paired_difference(dict.fromkeys(range(1500), 1.0), dict.fromkeys(range(1500), 1.0))
    assert few.value == many.value == 0
    assert few.low < -0.1 and few.high > 0.1
    assert -0.003 < many.low < 0 < many.high < 0.003


def test_the_interval_of_graded_answers_is_as_narrow_as_their_differences():
    rng = random.Random(0)
    first, second = ({problem: rng.random() for problem in range(20)} for _ in range(2))
    wide, narrow = (
        paired_difference(*({problem: scale * score for problem, score in scores.items()} for scores in (first, second)))
        for scale in (1.0, 0.1)
    )
    assert (narrow.low, narrow.high) == pytest.approx((0.1 * wide.low, 0.1 * wide.high))
    assert narrow.high - narrow.low < 1.2 * 2 * 1.96 * narrow.standard_error


@given(SHARES, st.randoms())
def test_a_paired_difference_turns_its_sign_with_the_order_of_the_models(values: list[float], random) -> None:
    first = dict(enumerate(values))
    second = dict(enumerate(random.sample(values, len(values))))
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert -1 <= there.low <= there.value + 1e-9 and there.value - 1e-9 <= there.high <= 1
    assert there.value == pytest.approx(mean_over_problems(values).value - mean_over_problems(list(second.values())).value)


@pytest.mark.parametrize("second", [{"a": 1.0}, {"a": 1.0, "c": 0.0}, {"a": 1.0, "b": 0.0, "c": 0.0}])
def test_models_that_answered_other_problems_are_not_compared(second: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not the same problems"):
        paired_difference({"a": 1.0, "b": 0.0}, second)


def test_the_loss_counts_every_token_alike() -> None:
    mean = mean_loss([TokenLoss(nll=2.0, tokens=1), TokenLoss(nll=3.0, tokens=3), TokenLoss(nll=4.0, tokens=2)])
    assert mean.value == pytest.approx(9 / 6)
    # residuals nll - 1.5 tokens: 0.5, -1.5, 1.0
    assert mean.standard_error == pytest.approx(math.sqrt((0.25 + 2.25 + 1.0) * 3 / 2) / 6)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=20), st.integers(1, 50))
def test_the_error_of_a_loss_over_samples_of_equal_length_is_the_plain_one(losses: list[float], tokens: int) -> None:
    by_ratio = mean_loss([TokenLoss(loss * tokens, tokens) for loss in losses])
    plain = mean_over_problems(losses)
    assert by_ratio.value == pytest.approx(plain.value, abs=1e-9)
    assert by_ratio.standard_error == pytest.approx(plain.standard_error, abs=1e-9)


def test_a_paired_loss_is_far_surer_than_either_loss() -> None:
    first = {str(n): TokenLoss(nll=100.0 * n + 1, tokens=100) for n in range(1, 9)}
    second = {str(n): TokenLoss(nll=100.0 * n - (n % 2), tokens=100) for n in range(1, 9)}
    found = paired_loss_difference(first, second)
    assert found.value == pytest.approx(0.015)
    # differences per token are 0.02 and 0.01 by turns: sd 0.005 * sqrt(8 / 7), by sqrt(8); t with 7 degrees of freedom
    error = 0.005 * math.sqrt(8 / 7) / math.sqrt(8)
    assert found.standard_error == pytest.approx(error)
    assert (found.low, found.high) == (
        pytest.approx(0.015 - 2.365 * error, rel=1e-3),
        pytest.approx(0.015 + 2.365 * error, rel=1e-3),
    )


def test_losses_over_other_tokens_are_not_compared() -> None:
    with pytest.raises(ValueError, match="answer tokens"):
        paired_loss_difference({"a": TokenLoss(1.0, 3)}, {"a": TokenLoss(1.0, 4)})


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # any table of Student's t, two-sided 95 %
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (7, 2.365),
        (10, 2.228),
        (30, 2.042),
        (10_000, 1.960),
    ],
)
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=0.01)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n), st.integers(1, n))))
def test_pass_at_k_is_the_fraction_of_all_choices_of_k_samples_with_a_correct_one(drawn: tuple[list[bool], int]) -> None:
    samples, k = drawn
    choices = [any(chosen) for chosen in itertools.combinations(samples, k)]
    assert pass_at_k(sum(samples), len(samples), k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_of_very_many_samples_is_exact() -> None:
    assert pass_at_k(1, 5000, 2500) == pytest.approx(0.5)
    assert pass_at_k(0, 5000, 2500) == 0
    assert pass_at_k(5000, 5000, 1) == 1


@pytest.mark.parametrize(("correct", "n", "k"), [(1, 4, 5), (1, 4, 0), (5, 4, 1), (-1, 4, 1)])
def test_pass_at_more_samples_than_there_are_is_refused(correct: int, n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples"):
        pass_at_k(correct, n, k)


def test_pass_at_k_over_problems_has_the_error_of_a_mean() -> None:
    mean = mean_pass_at_k([(0, 4), (1, 4), (4, 4)], 2)
    assert mean == mean_over_problems([0.0, 0.5, 1.0])


def test_the_bootstrap_interval_is_that_of_the_exact_distribution() -> None:
    # 30 problems, half of them correct: the mean of a resample is Binomial(30, 1/2) / 30, whose 2.5 % and 97.5 % points are 10 and
    # 20 (those at 5 % and 95 %: 11 and 19).
    assert bootstrap_interval([0.0, 1.0] * 15) == Interval(pytest.approx(10 / 30), pytest.approx(20 / 30))


@given(SHARES, st.integers(0, 5))
def test_the_bootstrap_interval_lies_about_the_mean_and_repeats(values: list[float], seed: int) -> None:
    found = bootstrap_interval(values, seed)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert bootstrap_interval(values, seed) == found
    mean = mean_over_problems(values)
    if mean.standard_error and len(values) >= 10:
        assert found.low <= mean.value <= found.high
        # the bootstrap's spread is the standard error with ddof 0; the shape of the distribution makes up the rest
        assert (found.high - found.low) / (2 * 1.96 * mean.standard_error) == pytest.approx(0.95, abs=0.25)


def test_the_bootstrap_wavers_little_with_its_seed_and_does_so() -> None:
    values = [random.Random(0).random() for _ in range(50)]
    values = [value * index % 1 for index, value in enumerate(values)]
    intervals = [bootstrap_interval(values, seed) for seed in range(5)]
    assert len(set(intervals)) > 1
    width = intervals[0].high - intervals[0].low
    assert max(abs(interval.low - intervals[0].low) for interval in intervals) < 0.05 * width


def test_the_bootstrap_draws_the_same_number_of_resamples_whatever_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 0.25, 1.0, 0.5]
    at_once = bootstrap_interval(values)
    monkeypatch.setattr(statistics, "AT_ONCE", 12_345)
    assert bootstrap_interval(values) == at_once


def test_wilsons_interval_is_the_published_one() -> None:
    found = wilson(81 / 263, 263)  # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 0.2553, 0.3662
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_none_correct_and_all_correct_have_an_interval() -> None:
    none, every = accuracy_interval([0.0] * 30), accuracy_interval([1.0] * 30)
    assert (every.low, every.high) == (pytest.approx(0.8865, abs=1e-4), 1.0)  # n / (n + z²)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - every.low))


def test_a_single_correct_answer_rules_out_that_none_is() -> None:
    assert accuracy_interval([1.0] + [0.0] * 29) == wilson(1 / 30, 30)
    assert accuracy_interval([1.0] + [0.0] * 29).low > 0


def test_problems_that_all_scored_one_share_leave_room_for_doubt() -> None:
    assert accuracy_interval([0.25] * 8) == wilson(0.25, 8)


def test_shares_have_a_bootstrap_interval() -> None:
    assert accuracy_interval([0.25, 0.5, 1.0], seed=3) == bootstrap_interval([0.25, 0.5, 1.0], seed=3)


@given(SHARES)
def test_the_interval_of_an_accuracy_has_a_width_and_holds_it(values: list[float]) -> None:
    found = accuracy_interval(values)
    assert 0 <= found.low < found.high <= 1
    if len(values) >= 10:
        assert found.low <= mean_over_problems(values).value + 1e-12 and found.high >= mean_over_problems(values).value - 1e-12


def test_one_problem_has_no_interval() -> None:
    assert accuracy_interval([1.0]) is None


def test_the_interval_of_a_loss_is_students() -> None:
    mean = mean_loss([TokenLoss(nats, 10) for nats in (10.0, 12.0, 14.0)])
    found = student_interval(mean)
    assert found.high - mean.value == pytest.approx(4.303 * mean.standard_error, rel=1e-3)  # t table, 2 degrees of freedom
    assert mean.value - found.low == pytest.approx(found.high - mean.value)
    assert student_interval(mean_loss([TokenLoss(1.0, 10)])) is None


def test_lengths_are_reported_by_their_quantiles() -> None:
    assert lengths_of(range(1, 102)) == Lengths(101, 51, 11, 26, 51, 76, 91, 101)
    assert lengths_of([7]) == Lengths(1, 7, 7, 7, 7, 7, 7, 7)
    assert lengths_of([]) is None


def test_a_vote_over_graded_answers_has_the_score_of_the_winner() -> None:
    vote = majority_vote([("a", 0.25), ("b", 1.0), ("a", 0.25), (None, 0.0)], str.__eq__)
    assert (vote.score, vote.tie) == (0.25, False)
    vote = majority_vote([("a", 0.25), ("b", 1.0)], str.__eq__)
    assert (vote.score, vote.tie) == (0.625, True)


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=12))
def test_mcnemars_p_is_the_binomial_one_and_that_of_all_sign_flips(differences: list[int]) -> None:
    first, second = differences.count(1), differences.count(-1)
    n = first + second
    as_unlikely = [wins for wins in range(n + 1) if abs(wins - n / 2) >= abs(first - n / 2)]
    assert mcnemar_p(first, second) == pytest.approx(sum(math.comb(n, wins) for wins in as_unlikely) / 2**n)
    assert sign_flip_p(differences) == pytest.approx(mcnemar_p(first, second))


def test_mcnemars_p_is_that_of_the_tables() -> None:
    assert mcnemar_p(5, 1) == pytest.approx(0.21875)  # 2 * (1 + 6) / 64
    assert mcnemar_p(0, 6) == pytest.approx(0.03125)
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(600, 600) == 1
    assert mcnemar_p(3000, 2000) < 1e-40


@given(st.lists(st.sampled_from([-0.75, -0.3, -0.1, 0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=9))
def test_the_permutation_p_is_the_share_of_all_signs_with_as_large_a_sum(differences: list[float]) -> None:
    exact = [Fraction(str(difference)) for difference in differences]
    found = abs(sum(exact))
    sums = [abs(sum(d * s for d, s in zip(exact, signs, strict=True))) for signs in itertools.product((1, -1), repeat=len(exact))]
    assert sign_flip_p(differences) == pytest.approx(sum(value >= found for value in sums) / len(sums))


def test_a_drawn_permutation_p_is_near_the_exact_one_repeats_and_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.25, -0.5, 0.125, 0.75, 0.5, -0.25, 0.375, 0.5, 0.25, -0.125, 0.5, 0.625, -0.25, 0.5]
    exact = sign_flip_p(differences)
    monkeypatch.setattr(statistics, "ALL_FLIPS_UP_TO", 0)
    drawn = sign_flip_p(differences, seed=1)
    assert 0.01 < exact < 0.1 and drawn == pytest.approx(exact, abs=0.006) and drawn != exact
    assert sign_flip_p(differences[::-1], seed=1) == sign_flip_p([-d for d in differences], seed=1) == drawn
    assert sign_flip_p(differences, seed=2) != drawn
    assert sign_flip_p([0.5] * 100) == 1 / (statistics.SIGN_FLIPS + 1)
    monkeypatch.setattr(statistics, "AT_ONCE", 1000)
    assert sign_flip_p(differences, seed=1) == pytest.approx(exact, abs=0.006)


def test_a_difference_names_the_test_by_which_it_was_judged() -> None:
    first, second = {"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 1.0, "b": 0.0, "c": 0.0}
    found = paired_difference(first, second)
    assert (found.test, found.p) == ("mcnemar", 1.0)
    found = paired_difference({**first, "c": 0.5}, second)
    assert (found.test, found.p) == ("permutation", 0.5)
    six = dict.fromkeys("abcdef", 1.0)
    assert paired_difference(six, dict.fromkeys("abcdef", 0.0)).p == pytest.approx(2 / 64)
    assert paired_loss_difference({"a": TokenLoss(1.0, 3)}, {"a": TokenLoss(2.0, 3)}).p is None
