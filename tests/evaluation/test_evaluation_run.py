import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lt_train.evaluation.grading.grader_process import SECONDS, Grader
from lt_train.evaluation.grading.math_answers import Grade
from lt_train.evaluation.plan import make_plan
from lt_train.evaluation.records import read_records
from lt_train.evaluation.run import evaluate
from lt_train.evaluation.scores import AnswerScores, difference, read_scores
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.engine import Engine
from lt_train.recipe import schema as recipe
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import family_tokenizer
from tests.support.full_disk import files_of_at_most
from tests.support.graders import graders_are_kept


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def kept_graders() -> Iterator[None]:
    with graders_are_kept():
        yield


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{n}", "problem": "0123456789"[: n + 2] + "?", "answer": str(n % 4)} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def evaluation(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: str):
    """Evaluate into a folder, with some settings of the evaluation changed."""

    def call(
        out: Path, model_fingerprint: str = "m", system: str | None = None, rank: int = 0, world_size: int = 1, **changed: Any
    ):
        settings = dict(benchmark="ledger", path=problems, samples=3, temperature=2.5, max_new_tokens=12, batch_size=4, seed=5)
        eval_config = recipe.Eval(**{**settings, **changed})
        engine = Engine(model, tokenizer, max_slots=eval_config.batch_size)
        plan = make_plan(
            eval_config,
            recipe.Prompt(system=system),
            tokenizer,
            context=model.config.max_position_embeddings,
            seed=3,
        )
        return evaluate(
            plan.for_model(model_fingerprint, engine.stop_ids), engine, out, rank=rank, world_size=world_size, progress=False
        )

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    assert len({(row["problem"], row["sample"]) for row in rows}) == len(rows)
    return {(row["problem"], row["sample"]): row for row in rows}


def without_times(scores: AnswerScores) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if name != "tokens_per_second"}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the engine fail after a number of answers."""
    original = Engine.answers

    def failing(*arguments: Any) -> Iterator[Any]:
        for number, answer in enumerate(original(*arguments)):
            if number == count:
                raise Interrupted
            yield answer

    monkeypatch.setattr(Engine, "answers", failing)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_disk_that_fills_loses_no_finished_sample(evaluation, tmp_path: Path, share: float) -> None:
    evaluation(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    evaluation(tmp_path / "out", limit=1)  # begun while there was room
    begun, needed = ((tmp_path / name / "samples.jsonl").stat().st_size for name in ("out", "whole"))
    with files_of_at_most(begun + int(share * (needed - begun))), pytest.raises(UserError, match="make room"):
        evaluation(tmp_path / "out")
    kept = samples(tmp_path / "out")
    assert (3 if share == 0 else 4) <= len(kept) < 18
    evaluation(tmp_path / "out")
    assert kept.items() <= samples(tmp_path / "out").items()
    assert samples(tmp_path / "out") == samples(tmp_path / "whole")
    assert contents(tmp_path / "out").keys() == expected.keys()


def test_scores_that_find_no_room_are_made_when_there_is_some(evaluation, tmp_path: Path) -> None:
    expected = evaluation(tmp_path / "out")
    (tmp_path / "out/scores.json").unlink()
    before = contents(tmp_path / "out")
    with files_of_at_most(10), pytest.raises(OSError):
        evaluation(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert without_times(evaluation(tmp_path / "out")) == without_times(expected)


def test_scores_are_those_of_the_records(evaluation, tmp_path: Path) -> None:
    scores = evaluation(tmp_path / "out", samples=12)
    rows = samples(tmp_path / "out").values()
    assert len(rows) == 72
    assert scores.accuracy == pytest.approx(sum(row["correct"] for row in rows) / 72)
    assert 0 < scores.accuracy < 1, "this test needs a model that is correct now and then"
    assert scores.truncated == pytest.approx(sum(row["finish_reason"] == "length" for row in rows) / 72)
    assert scores.unanswered == pytest.approx(sum(row["extracted"] is None for row in rows) / 72)
    assert scores.tokens == sum(row["tokens"] for row in rows)
    assert (scores.problems, scores.available, scores.samples) == (6, 6, 12)
    assert scores.tokens_per_second > 0
    assert read_scores(tmp_path / "out" / "scores.json") == scores
    assert difference(scores, scores).value == 0


def test_records_have_the_request_and_the_answer(evaluation, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    evaluation(tmp_path / "out")
    for row in samples(tmp_path / "out").values():
        tokens = len(tokenizer(row["text"]).input_ids)
        assert row["tokens"] == tokens + (row["finish_reason"] == "stop")
        assert "<eos>" not in row["text"]
        correct = row["extracted"] == str(int(row["problem"][1:]) % 4)
        assert row["correct"] == (correct and row["finish_reason"] == "stop")
        assert row["graded_score"] == float(correct)
        assert row["seed"] is not None


@pytest.mark.parametrize("count", [0, 5, 17])
def test_an_interrupted_evaluation_ends_with_the_samples_of_an_undisturbed_one(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    undisturbed = evaluation(tmp_path / "undisturbed")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, count)
        evaluation(tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()
    with open(tmp_path / "out" / "samples.jsonl", "a") as file:
        file.write('{"problem": "p1", "sam')
    resumed = evaluation(tmp_path / "out")
    assert samples(tmp_path / "out") == samples(tmp_path / "undisturbed")
    assert without_times(resumed) == without_times(undisturbed)


def test_a_finished_evaluation_is_returned_without_drawing_anything(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = evaluation(tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.delattr(Engine, "answers")
    assert evaluation(tmp_path / "out") == scores
    assert contents(tmp_path / "out") == before


def test_more_samples_and_problems_are_added_to_those_there(evaluation, tmp_path: Path) -> None:
    evaluation(tmp_path / "out", samples=1, limit=2)
    first = samples(tmp_path / "out")
    scores = evaluation(tmp_path / "out", batch_size=16)
    assert samples(tmp_path / "out").items() >= first.items()
    assert without_times(scores) == without_times(evaluation(tmp_path / "at_once"))


def test_a_limited_score_reports_its_number_of_problems(evaluation, tmp_path: Path) -> None:
    scores = evaluation(tmp_path / "out", limit=2)
    assert (scores.problems, scores.available) == (2, 6)
    assert list(scores.by_problem) == ["p0", "p1"]


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"model_fingerprint": "n"}, "model: 'm', 'n'"),
        ({"temperature": 0.7}, "temperature: 2.5, 0.7"),
        ({"temperature": 0.0, "samples": 1}, "seed: 5, None"),
        ({"max_new_tokens": 11}, "max_new_tokens: 12, 11"),
        ({"seed": 6}, "seed: 5, 6"),
        ({"system": "be brief"}, "prompt: "),
    ],
)
def test_results_made_in_another_way_are_neither_taken_nor_overwritten(
    evaluation, tmp_path: Path, changed: dict[str, Any], reported: str
) -> None:
    evaluation(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=reported):
        evaluation(tmp_path / "out", **changed)
    assert contents(tmp_path / "out") == before


def test_a_changed_benchmark_file_is_another_evaluation(evaluation, problems: str, tmp_path: Path) -> None:
    evaluation(tmp_path / "out")
    Path(problems).write_text(Path(problems).read_text().replace('"answer": "3"', '"answer": "2"'))
    with pytest.raises(UserError, match="problems: "):
        evaluation(tmp_path / "out")


def test_the_seed_of_the_recipe_counts_only_where_the_evaluation_has_none(evaluation, tmp_path: Path) -> None:
    evaluation(tmp_path / "of_the_recipe", seed=None)
    evaluation(tmp_path / "three", seed=3)
    evaluation(tmp_path / "zero", seed=0)
    assert samples(tmp_path / "of_the_recipe") == samples(tmp_path / "three")
    assert samples(tmp_path / "of_the_recipe") != samples(tmp_path / "zero")


def test_a_score_over_missing_samples_is_refused(evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.answers
    monkeypatch.setattr(Engine, "answers", lambda *arguments: list(original(*arguments))[1:])
    with pytest.raises(UserError, match="1 of 18 samples are missing"):
        evaluation(tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("content", ['{"kind": "answers", "benchm', '{"kind": "answers"}', "[]", '{"kind": "other"}'])
def test_a_corrupt_scores_file_is_a_clear_error_and_stays(evaluation, tmp_path: Path, content: str) -> None:
    evaluation(tmp_path / "out")
    (tmp_path / "out" / "scores.json").write_text(content)
    with pytest.raises(UserError, match=r"scores\.json: .*[Dd]elete it"):
        evaluation(tmp_path / "out")
    assert (tmp_path / "out" / "scores.json").read_text() == content


def test_an_answer_that_does_not_fit_the_context_is_refused_before_anything_is_drawn(evaluation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set max_new_tokens to at most"):
        evaluation(tmp_path / "out", max_new_tokens=125)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"max_new_tokens": 127}, "set max_new_tokens to at most 118"), ({"path": "nowhere.jsonl"}, "nowhere.jsonl")],
)
def test_what_would_stop_an_evaluation_is_found_without_a_model(
    tokenizer: PreTrainedTokenizerFast, problems: str, changed: dict[str, Any], reason: str
) -> None:
    eval_config = recipe.Eval(**{"benchmark": "ledger", "path": problems, "max_new_tokens": 12, **changed})
    with pytest.raises(UserError, match=reason):
        make_plan(eval_config, recipe.Prompt(), tokenizer, context=128, seed=0)


def test_a_thinking_budget_does_not_close_reasoning_with_the_tag_of_another_family(problems: str) -> None:
    plan = partial(make_plan, prompt=recipe.Prompt(), tokenizer=family_tokenizer("still"), context=4096, seed=0)
    settings: dict[str, Any] = {"benchmark": "ledger", "path": problems, "max_new_tokens": 12}
    with pytest.raises(
        UserError, match=r"closes its reasoning with <\|end_of_thought\|>\. Fix: set thinking_close to \"\\n\\n<\|end"
    ):
        plan(recipe.Eval(**settings, thinking_budget=8))
    for allowed in ({}, {"thinking_budget": 8, "thinking_close": "\n\n<|end_of_thought|>\n\n"}):
        assert len(plan(recipe.Eval(**settings, **allowed)).requests) == 6


def test_a_truncated_answer_is_incorrect_whatever_it_contains(evaluation, tmp_path: Path) -> None:
    evaluation(tmp_path / "out", samples=12)
    truncated = [row for row in samples(tmp_path / "out").values() if row["finish_reason"] == "length"]
    assert not any(row["correct"] or row["score"] for row in truncated)
    correct = [row for row in truncated if row["extracted"] == str(int(row["problem"][1:]) % 4)]
    assert correct, "this test needs a correct answer that did not end"


def test_truncated_answers_are_graded_on_request_without_drawing_again(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = evaluation(tmp_path / "out", samples=12)
    monkeypatch.setattr(Engine, "answers", lambda engine, requests, *_: pytest.fail("drew again") if requests else iter(()))
    graded = evaluation(tmp_path / "out", samples=12, truncated="graded")
    rows = samples(tmp_path / "out").values()
    assert graded.accuracy == pytest.approx(sum(row["graded_score"] for row in rows) / 72)
    assert graded.accuracy > strict.accuracy
    assert graded.accuracy_by_truncated_as == strict.accuracy_by_truncated_as
    assert graded.accuracy_by_truncated_as["incorrect"].value == strict.accuracy
    assert graded.majority == strict.majority
    assert read_scores(tmp_path / "out/scores.json").truncated_as == "graded"
    assert without_times(evaluation(tmp_path / "out", samples=12)) == without_times(strict)


def test_samples_of_an_older_grader_are_judged_again_when_they_are_scored(evaluation, tmp_path: Path) -> None:
    expected = evaluation(tmp_path / "out", samples=12)
    drawn = (tmp_path / "out/samples.jsonl").read_text()
    older = [json.loads(line) for line in drawn.splitlines()]
    for row in older:
        del row["graded_score"], row["grader"]
        row |= {"extracted": None, "extracted_from": None, "score": 0.0, "correct": False}
    (tmp_path / "out/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    (tmp_path / "out/scores.json").unlink()
    assert without_times(evaluation(tmp_path / "out", samples=12)) == without_times(expected)
    verdicts = (tmp_path / "out/verdicts.jsonl").read_text()
    (tmp_path / "out/scores.json").unlink()
    assert without_times(evaluation(tmp_path / "out", samples=12)) == without_times(expected)
    assert (tmp_path / "out/verdicts.jsonl").read_text() == verdicts  # judged once


def test_an_answer_that_timed_out_beside_the_model_is_judged_again_alone(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluation(tmp_path / "undisturbed", truncated="graded")
    original = Grader.grade

    def busy(grader: Grader, text: str, reference: str, **options: Any) -> Grade:
        verdict = original(grader, text, reference, **options)
        failure = replace(verdict, correct=False, error="Timeout: no verdict within 5 seconds")
        return verdict if grader.seconds > SECONDS else failure

    monkeypatch.setattr(Grader, "grade", busy)
    found = evaluation(tmp_path / "out", truncated="graded")
    assert without_times(found) == without_times(expected)
    assert found.grading_errors == 0 < found.accuracy
    records = read_records(tmp_path / "out", found.fingerprint)
    assert not any(record.grading_error for record in records.values())


def test_an_answer_that_times_out_alone_counts_as_a_failure_of_the_grader(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grader, "grade", lambda *_, **__: Grade("9!!!", False, "Timeout: no verdict within 5 seconds", "boxed"))
    found = evaluation(tmp_path / "out", samples=1)
    assert found.grading_errors == found.problems == 6
    verdicts = (tmp_path / "out/verdicts.jsonl").read_text().splitlines()
    assert len(verdicts) == 6 and "Judged alone: Timeout" in verdicts[0]
    (tmp_path / "out/scores.json").unlink()
    evaluation(tmp_path / "out", samples=1)
    assert (tmp_path / "out/verdicts.jsonl").read_text().splitlines() == verdicts  # not once more


def test_samples_without_the_instruction_are_refused_with_the_way_to_keep_them(evaluation, tmp_path: Path) -> None:
    evaluation(tmp_path / "out")
    with pytest.raises(UserError, match=r"instruction: None, 'box it'(?s:.*)set `instruction` to the one there"):
        evaluation(tmp_path / "out", instruction="box it")
    assert evaluation(tmp_path / "out", instruction="") == read_scores(tmp_path / "out/scores.json")


def test_a_partial_score_is_marked_and_completed_later(evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.answers
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "answers", lambda *arguments: list(original(*arguments))[4:])
        partial = evaluation(tmp_path / "out", allow_partial=True)
    assert (partial.partial, partial.missing) == (True, 4)
    whole = evaluation(tmp_path / "out", allow_partial=True)
    assert (whole.partial, whole.missing) == (False, 0)


def test_processes_share_the_samples_and_the_first_waits_for_the_others_and_scores_them_all(
    evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluation(tmp_path / "out", rank=2, world_size=3) is None

    def while_it_waits(reached: Callable[[], bool]) -> None:
        assert not reached()
        assert evaluation(tmp_path / "out", rank=1, world_size=3) is None
        assert reached()

    monkeypatch.setattr("lt_train.evaluation.run.wait_until", while_it_waits)
    shared = evaluation(tmp_path / "out", rank=0, world_size=3)
    assert {path.name for path in (tmp_path / "out").glob("samples*")} == {f"samples-{rank}.jsonl" for rank in range(3)}
    assert without_times(shared) == without_times(evaluation(tmp_path / "alone"))


def test_a_lost_process_loses_no_finished_sample(evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 3)
        evaluation(tmp_path / "out", rank=1, world_size=2)
    three = (tmp_path / "out" / "samples-1.jsonl").read_text()
    assert len(three.splitlines()) == 3
    scores = evaluation(tmp_path / "out")  # one process resumes with the rest
    assert (tmp_path / "out" / "samples-1.jsonl").read_text() == three
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 15
    assert without_times(scores) == without_times(evaluation(tmp_path / "alone"))
