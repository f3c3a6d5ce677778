"""Intervals and numbers in words."""

from dataclasses import replace

import pytest

from lt_train.evaluation.scores import read_scores
from lt_train.evaluation.statistics import Interval
from lt_train.report.figures import interval, kilo, size, wilson
from tests.report.made_runs import loss_scores


@pytest.fixture
def scores(run):
    return read_scores(run / "eval/base/ledger/scores.json")


def test_an_accuracy_has_the_interval_of_its_scores(scores):
    assert scores.interval.low < scores.accuracy < scores.interval.high
    assert interval(scores) == scores.interval


def test_all_right_still_leaves_room_for_doubt(scores):
    found = interval(replace(scores, accuracy=1.0, problems=30, interval=Interval(1.0, 1.0)))
    assert (found.low, found.high) == (pytest.approx(0.8865, abs=1e-4), 1.0)  # n / (n + z²)


def test_wilsons_interval_is_the_published_one():
    found = wilson(81 / 263, 263)  # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 0.2553, 0.3662
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_a_single_problem_has_no_interval(scores):
    assert interval(replace(scores, problems=1, interval=None)) is None
    assert interval(loss_scores([10.0])) is None


def test_a_loss_has_students_interval():
    scores = loss_scores([10.0, 12.0, 14.0])
    found = interval(scores)
    assert found.high - scores.loss == pytest.approx(4.303 * scores.standard_error, rel=1e-3)  # t table, 2 degrees of freedom


@pytest.mark.parametrize(
    ("count", "said"),
    [(12, "12 B"), (1024, "1 KiB"), (1020 * 2**20, "1,020 MiB"), (1.5 * 2**30, "1.5 GiB"), (999 * 2**10, "999 KiB")],
)
def test_sizes_are_said_in_the_unit_that_fits(count, said):
    assert size(count) == said


@pytest.mark.parametrize(
    ("tokens", "said"), [(0, "0"), (512, "512"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (131072, "128K")]
)
def test_lengths_are_said_in_k_of_1024(tokens, said):
    assert kilo(tokens) == said
