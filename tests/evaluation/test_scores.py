import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from lt_train.evaluation.records import SampleRecord
from lt_train.evaluation.scores import AnswerScores, LossScores, answer_scores, difference, read_scores, write_scores
from lt_train.evaluation.statistics import Interval, Lengths, Mean, TokenLoss, bootstrap_interval
from lt_train.runtime.errors import UserError

RECORD = SampleRecord(
    problem="a",
    sample=0,
    seed=None,
    prompt_hash="f00",
    text="",
    tokens=10,
    thinking_tokens=None,
    finish_reason="stop",
    extracted="1/2",
    extracted_from="boxed",
    score=1.0,
    correct=True,
    grading_error=None,
    seconds=0.5,
)
INCORRECT = {"extracted": "7", "score": 0.0, "correct": False}

Records = dict[tuple[str, int], SampleRecord]


def records(**changed_by_problem: list[dict[str, Any]]) -> Records:
    """A correct sample for each dict, with its changes."""
    return {
        (problem, sample): replace(RECORD, problem=problem, sample=sample, **changes)
        for problem, samples in changed_by_problem.items()
        for sample, changes in enumerate(samples)
    }


def equal_fractions(first: str, second: str) -> bool:
    return Fraction(first) == Fraction(second)


def scores(there: Records, problems: str = "ab", samples: int = 4, **options: Any) -> AnswerScores:
    return answer_scores(
        there,
        list(problems),
        samples,
        **{"benchmark": "ledger", "available": 9, "fingerprint": {"seed": 1}, "equivalent": equal_fractions, **options},
    )


EIGHT = records(
    a=[{"tokens": 20, "thinking_tokens": 15}, {"extracted": "2/4", "thinking_tokens": 5}, INCORRECT, INCORRECT],
    b=[
        {**INCORRECT, "finish_reason": "length", "extracted": None, "extracted_from": None, "tokens": 50},
        {**INCORRECT, "grading_error": "Timeout"},
        {**INCORRECT, "extracted_from": "phrase"},
        {"tokens": 40},
    ],
)


def test_every_figure_follows_from_the_records() -> None:
    found = scores(EIGHT)
    assert (found.problems, found.available, found.samples) == (2, 9, 4)
    assert found.by_problem == {"a": 0.5, "b": 0.25}
    assert found.accuracy == pytest.approx(3 / 8)
    assert found.standard_error == pytest.approx(0.125)
    assert found.interval == bootstrap_interval([0.5, 0.25])
    assert found.majority == pytest.approx((0.5 + 0) / 2)
    assert found.ties == 1
    assert (found.truncated, found.unanswered, found.from_phrase, found.grading_errors) == (1 / 8, 1 / 8, 1 / 8, 1)
    assert found.tokens == 20 + 5 * 10 + 50 + 40
    assert found.tokens_per_sample == found.tokens / 8
    assert found.tokens_per_second == pytest.approx(found.tokens / 4)
    assert found.pass_at == {
        1: Mean(pytest.approx(3 / 8), pytest.approx(0.125), 2),
        2: Mean(pytest.approx((5 / 6 + 1 / 2) / 2), pytest.approx(1 / 6), 2),
        4: Mean(1.0, 0.0, 2),
    }
    assert found.lengths_correct.samples == 3 and found.lengths_correct.mean == pytest.approx(70 / 3)
    assert found.lengths_incorrect.samples == 5 and found.lengths_incorrect.longest == 50
    assert (found.thinking.samples, found.thinking.mean) == (2, 10)
    assert (found.partial, found.missing) == (False, 0)


def test_where_none_or_all_are_correct_the_interval_still_has_a_width() -> None:
    none, every = scores(records(a=[INCORRECT], b=[INCORRECT]), samples=1), scores(records(a=[{}], b=[{}]), samples=1)
    assert none.interval == Interval(0.0, pytest.approx(0.6576, abs=1e-4))  # Wilson's of 0 of 2: z² / (n + z²)
    assert every.interval == Interval(pytest.approx(0.3424, abs=1e-4), 1.0)


def test_samples_and_problems_that_were_not_requested_do_not_count() -> None:
    more = {**EIGHT, **records(c=[{"tokens": 10**6}] * 4), ("a", 4): replace(RECORD, sample=4, tokens=10**6)}
    assert scores(more) == scores(EIGHT)


def test_pass_at_k_stops_at_the_number_of_samples() -> None:
    assert list(scores(EIGHT, samples=3).pass_at) == [1, 2, 3]
    assert list(scores(EIGHT, samples=1).pass_at) == [1]


def test_graded_scores_are_averaged_and_only_full_ones_count_as_correct() -> None:
    graded = records(
        a=[{"score": 0.25, "correct": False}, {"extracted": "7"}],
        b=[{"score": 0.5, "correct": False}, {"extracted": "7", "score": 0.0, "correct": False}],
    )
    found = scores(graded, samples=2)
    assert found.by_problem == {"a": 0.625, "b": 0.25}
    assert found.accuracy == pytest.approx(0.4375)
    assert found.pass_at[1].value == pytest.approx(0.25)
    assert found.majority == pytest.approx((0.625 + 0.25) / 2)
    assert difference(found, replace(found, by_problem={"a": 0.5, "b": 0.25})).test == "permutation"


def test_answers_that_could_not_be_judged_are_not_compared_again() -> None:
    bad = {**INCORRECT, "extracted": "10^{10^{10}}", "grading_error": "Timeout"}
    found = scores(records(a=[bad, {}, bad, {}, bad]), problems="a", samples=5)  # Fraction() would fail on it
    assert (found.majority, found.ties) == (0.0, 0)


TRUNCATED = {"finish_reason": "length", "score": 0.0, "correct": False, "graded_score": 1.0}


def test_truncated_answers_count_as_requested_and_both_accuracies_are_kept() -> None:
    there = records(a=[TRUNCATED, {}], b=[{**TRUNCATED, "graded_score": 0.0, "extracted": "7"}, INCORRECT])
    strict, graded = scores(there, samples=2), scores(there, samples=2, truncated_as="graded")
    assert (strict.accuracy, strict.by_problem, strict.truncated_as) == (0.25, {"a": 0.5, "b": 0.0}, "incorrect")
    assert (graded.accuracy, graded.by_problem, graded.truncated_as) == (0.5, {"a": 1.0, "b": 0.0}, "graded")
    assert strict.accuracy_by_truncated_as == graded.accuracy_by_truncated_as == {"incorrect": strict.mean, "graded": graded.mean}
    assert (strict.pass_at[1].value, graded.pass_at[1].value) == (0.25, 0.5)
    assert graded.lengths_correct.samples == 2 and strict.lengths_correct.samples == 1
    with pytest.raises(ValueError, match="truncated: incorrect with truncated: graded"):
        difference(strict, graded)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_vote_depends_neither_on_the_order_of_samples_nor_on_truncation(order: tuple[int, ...]) -> None:
    correct, incorrect = {"extracted": "34"}, {**INCORRECT, "extracted": "7"}
    samples = [{**TRUNCATED, "extracted": "34"}, correct, correct, incorrect]
    assert scores(records(a=[samples[place] for place in order]), problems="a").majority == 1.0
    truncated = [{**TRUNCATED, "extracted": "34"}] * 3 + [incorrect]
    assert scores(records(a=[truncated[place] for place in order]), problems="a").majority == 1.0


def test_a_majority_of_incorrect_answers_is_incorrect_though_truncated_ones_voted_for_it() -> None:
    truncated = {**TRUNCATED, "extracted": "7", "graded_score": 0.0}
    assert scores(records(a=[truncated, truncated, truncated, {}]), problems="a").majority == 0.0


def test_answers_that_nothing_names_are_counted() -> None:
    found = scores(records(a=[{"extracted_from": "last"}, {}, {}, {"extracted_from": "phrase"}]), problems="a")
    assert (found.from_last, found.from_phrase) == (0.25, 0.25)


def test_a_missing_sample_is_an_error_that_names_it_and_the_fix() -> None:
    there = {key: record for key, record in EIGHT.items() if key != ("b", 2)}
    with pytest.raises(UserError, match=r"1 of 8 samples are missing, such as sample 2 of problem b\. .*allow_partial: true"):
        scores(there)


def test_a_partial_score_is_marked_and_of_what_is_there() -> None:
    there = {key: record for key, record in EIGHT.items() if key[1] < 2 or key[0] == "a"}
    found = scores(there, problems="abc", allow_partial=True)
    assert (found.partial, found.missing, found.problems) == (True, 6, 2)
    assert found.by_problem == {"a": 0.5, "b": 0.0}
    assert list(found.pass_at) == [1, 2]
    whole = scores(EIGHT, allow_partial=True)
    assert (whole.partial, whole.missing) == (False, 0)


def test_no_sample_at_all_gives_no_score_not_even_a_partial_one() -> None:
    with pytest.raises(UserError, match="8 of 8 samples are missing"):
        scores({}, allow_partial=True)


def test_no_time_recorded_gives_no_speed() -> None:
    assert scores({key: replace(record, seconds=0.0) for key, record in EIGHT.items()}).tokens_per_second == 0


def test_scores_of_version_3_are_read(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "fixtures/run_before_the_folders/finished/old/eval/trained/ledger/scores.json"
    written = json.loads(path.read_text())
    assert written["version"] == 3
    found = read_scores(path)
    assert isinstance(found, AnswerScores)
    assert found.lengths_incorrect.samples == written["lengths_wrong"]["samples"]
    assert (found.truncated_as, found.accuracy_by_truncated_as, found.from_last) == ("incorrect", {}, 0.0)


LOSS = LossScores("heldout_loss", 1, 10, 1.5, None, {"model": "m"}, {"a": TokenLoss(15.0, 10)})


@pytest.mark.parametrize("written", [scores(EIGHT), scores(EIGHT, problems="a", samples=1), LOSS], ids=["answers", "one", "loss"])
def test_scores_are_read_back_as_they_were_written(tmp_path: Path, written: AnswerScores | LossScores) -> None:
    write_scores(tmp_path / "scores.json", written)
    found = read_scores(tmp_path / "scores.json")
    assert found == written
    if isinstance(found, AnswerScores):
        assert isinstance(found.pass_at[1], Mean)
        assert isinstance(found.lengths_correct, Lengths)
        assert found.interval is None or isinstance(found.interval, Interval)


@pytest.mark.parametrize("version", [None, 2, 5, "3"])
def test_scores_of_another_version_are_named_as_such(tmp_path: Path, version: object) -> None:
    write_scores(tmp_path / "scores.json", scores(EIGHT))
    found = json.loads((tmp_path / "scores.json").read_text())
    del found["version"]
    (tmp_path / "scores.json").write_text(json.dumps(found if version is None else {**found, "version": version}))
    with pytest.raises(UserError, match=rf"scores\.json: .*of version {version or 1}, this is 4\. Fix: delete it"):
        read_scores(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("name", "value"), [("pass_at", {"x": {}}), ("interval", 5), ("lengths_correct", {"mean": 1}), ("pass_at", None)]
)
def test_scores_with_a_damaged_part_are_a_clear_error(tmp_path: Path, name: str, value: object) -> None:
    write_scores(tmp_path / "scores.json", scores(EIGHT))
    found = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({**found, name: value}))
    with pytest.raises(UserError, match=r"scores\.json: not a complete scores\.json .*Fix: delete it"):
        read_scores(tmp_path / "scores.json")
