"""Samples on their way from disk into the page."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation.scores import read_scores
from lt_train.report.samples import character_limit, parts, read_samples, shortened, split_trace
from lt_train.runtime.errors import UserError
from tests.support.made_runs import ANSWERS, record

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=30)


def samples_of(run, variant="base"):
    folder = run / "eval" / variant / "ledger"
    return read_samples(folder, read_scores(folder / "scores.json"))


def test_the_samples_that_the_scores_count_are_read_in_their_order(run):
    assert list(samples_of(run)) == ANSWERS["base"]


def test_reading_leaves_the_folder_as_it_is(run):
    path = run / "eval/base/ledger/samples.jsonl"
    with open(path, "a") as file:
        file.write('{"problem": "p0", "sam')  # another process is writing
    before = path.read_bytes()
    assert len(samples_of(run)) == 4
    assert path.read_bytes() == before


def test_further_samples_of_an_earlier_run_are_left_out(run):
    with open(run / "eval/base/ledger/samples.jsonl", "a") as file:
        file.write(json.dumps(asdict(record("p0", sample=1))) + "\n")
        file.write(json.dumps(asdict(record("p9"))) + "\n")
    assert list(samples_of(run)) == ANSWERS["base"]


def test_samples_of_several_ranks_are_read_together(run):
    folder = run / "eval/base/ledger"
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").unlink()
    (folder / "samples-0.jsonl").write_text("".join(lines[::2]))
    (folder / "samples-1.jsonl").write_text("".join(lines[1::2]))
    assert list(samples_of(run)) == ANSWERS["base"]


def test_samples_that_are_gone_altogether_are_no_error(run):
    (run / "eval/base/ledger/samples.jsonl").unlink()
    assert samples_of(run) == ()


def test_scores_of_more_samples_than_there_are_is_an_error_that_names_one(run):
    path = run / "eval/base/ledger/samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"1 of the 4 samples .*not there, such as sample 0 of problem p3"):
        samples_of(run)


def test_partial_scores_have_the_samples_that_are_there(run):
    folder = run / "eval/base/ledger"
    path = folder / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    scores = replace(read_scores(folder / "scores.json"), partial=True, missing=1)
    assert len(read_samples(folder, scores)) == 3


def test_samples_of_another_model_than_the_scores_are_an_error(run):
    (run / "eval/base/ledger/meta.json").write_text('{"fingerprint": {"model": "another"}}')
    with pytest.raises(UserError, match=r"model: 'another', 'base'"):
        samples_of(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", r"samples\.jsonl:5: not JSON"),
        ("[]", r"samples\.jsonl:5: a row must be a JSON object"),
        ('{"problem": "p0"}', r"samples\.jsonl:5: not a sample of this version"),
        (json.dumps({**asdict(record("p0")), "tokens": "many"}), r"samples\.jsonl:5: not a complete sample \(tokens"),
        (json.dumps({**asdict(record("p0")), "text": "another"}), r"samples\.jsonl:5: a second, different sample 0 of problem p0"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(run, damage, message):
    with open(run / "eval/base/ledger/samples.jsonl", "a") as file:
        file.write(damage + "\n")
    with pytest.raises(UserError, match=message):
        samples_of(run)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>a</think>b", "<think>a</think>", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "<|begin_of_thought|>a<|end_of_thought|>", "b"),
        ("a</think>b</think>c", "a</think>b</think>", "c"),  # as extraction sees it: what counts stands after the last mark
        ("<think>never closed", "<think>never closed", ""),
        (" \n<|begin_of_thought|>never closed", " \n<|begin_of_thought|>never closed", ""),
        ("no thought at all", "", "no thought at all"),
        ("", "", ""),
    ],
)
def test_a_trace_folds_up_to_where_the_reasoning_ends(text, reasoning, answer):
    trace = split_trace(text)
    assert (trace.reasoning, trace.answer) == (reasoning, answer)


@given(LENGTHS, st.integers(1, 200), st.integers(1, 2000))
def test_the_limit_is_the_greatest_that_keeps_all_traces_within_the_total(lengths, most, total):
    def kept(limit):
        return sum(min(length, limit) for length in lengths)

    limit = character_limit(lengths, most, total)
    assert 0 <= limit <= most and kept(limit) <= total
    assert limit == most or kept(limit + 1) > total


@given(st.text(max_size=300), st.integers(0, 100))
def test_what_is_left_out_is_reported_and_the_rest_is_whole(text, limit):
    short = shortened(text, limit)
    if len(text) <= limit:
        assert short == text
    else:
        assert f"[… {len(text) - limit:,} characters left out …]" in short
        assert short.startswith(text[: limit - limit // 2])
        assert short.endswith(text[len(text) - limit // 2 :])


def test_of_a_long_sample_the_reasoning_is_shortened_and_the_answer_stays():
    long = record("p0", text="<think>" + "x" * 5000 + "</think>The answer is 2")
    reasoning, answer = parts(long, 1000)
    assert answer == "The answer is 2"
    assert "characters left out" in reasoning and len(reasoning) < 1100
