"""The tables of a report say what the scores say."""

from dataclasses import replace

import pytest

from lt_train.evaluation.scores import difference, read_scores, write_scores
from lt_train.evaluation.statistics import Mean
from lt_train.report.contents import read_runs
from lt_train.report.tables import interval_text, result_table
from tests.support.made_runs import made_run, measured, record


def table_of(*folders, evaluation="ledger"):
    rows = [each for run in read_runs(folders) for each in run.measured if each.result.evaluation == evaluation]
    return result_table(rows, several_runs=len(folders) > 1)


def test_every_variant_has_its_scores_with_their_uncertainty(run):
    table = table_of(run)
    base, converted, trained = table.rows
    assert [row.label for row in table.rows] == ["base", "reach, untrained", "reach, trained"]
    assert base.score == "75.0 ± 25.0" and base.difference == "–"
    scores = {variant: read_scores(run / "eval" / variant / "ledger/scores.json") for variant in ("base", "converted", "trained")}
    found = difference(scores["converted"], scores["base"])
    assert converted.difference == f"-50.0 [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    assert converted.test.startswith("p = 0.5 (McNemar")  # two problems lost, none won: 2 / 2²
    assert trained.interval == f"{100 * scores['trained'].interval.low:.1f} to {100 * scores['trained'].interval.high:.1f}"


def test_where_all_problems_scored_the_same_there_is_an_interval_and_no_standard_error_of_nothing(run):
    measured(run, "trained", [record(f"p{number}", correct=False) for number in range(4)], run.parent / "tiny-problems.jsonl")
    trained = table_of(run).rows[-1]
    assert (trained.score, trained.interval) == ("0.0", "0.0 to 49.0")  # Wilson's of 0 of 4: z² / (n + z²)


def test_truncated_unanswered_tokens_speed_and_memory_stand_in_their_columns(run):
    table = table_of(run)
    named = dict(zip([name for name, _ in table.columns[3:]], table.rows[1].cells, strict=True))
    assert named == {
        "truncated, %": "25.0",
        "no answer, %": "25.0",
        "tokens per answer": "240",  # (70 + 512 + 300 + 80) / 4
        "tokens per s": "50",
        "KV at 32K": "16 MiB",
    }


def test_votes_have_columns_where_there_is_more_than_one_answer(tmp_path):
    run = made_run(tmp_path / "runs")
    records = [record(problem, sample=number, correct=number == 0) for problem in ("p0", "p1") for number in range(2)]
    (run / "eval/base/ledger/samples.jsonl").unlink()
    measured(run, "base", records, tmp_path / "runs/tiny-problems.jsonl")
    table = table_of(run)
    assert [name for name, _ in table.columns[3:5]] == ["majority, %", "pass@k, %"]
    assert table.rows[0].cells[:2] == ("50.0", "100.0 (k = 2)")
    assert table.rows[1].cells[1] == "25.0 (k = 1)"
    assert table.rows[1].difference == "not comparable"  # the base answered two problems only
    answered = [note.partition(" problems")[0] for note in table.notes[:3]]
    assert answered == ["base: ledger: 2 of 4", "reach, untrained: ledger: 4", "reach, trained: ledger: 4"]
    assert "Problems or sampling differ: compare rows that are alike." in table.notes


@pytest.mark.parametrize(("benchmark", "digits"), [("heldout_loss", 3), ("heldout_kl", 4)])
def test_an_interval_has_the_digits_of_its_value(run, benchmark, digits):
    scores = replace(read_scores(run / "eval/base/heldout_loss/scores.json"), benchmark=benchmark)
    shown = [*scores.text.split(" ± "), *interval_text(scores).split(" to ")]
    assert [len(number.partition(".")[2]) for number in shown] == [digits] * 4


def test_losses_are_better_when_they_fall(run):
    table = table_of(run, evaluation="heldout_loss")
    assert [name for name, _ in table.columns] == ["nats per token ± SE", "95 % interval", "minus base", "KV at 32K"]
    assert table.rows[0].score == "1.200 ± 0.115"
    folder = run / "eval/trained/heldout_loss/scores.json"
    write_scores(folder, replace(read_scores(folder), by_sample={
        key: replace(loss, nll=loss.nll - 5 - 0.01 * number)
        for number, (key, loss) in enumerate(read_scores(run / "eval/base/heldout_loss/scores.json").by_sample.items())
    }))  # fmt: skip
    assert table_of(run, evaluation="heldout_loss").rows[1].tendency == "better"


def test_a_divergence_from_the_base_is_named_and_is_not_compared_with_the_base(run):
    rows = [each for found in read_runs([run]) for each in found.measured if each.result.evaluation == "heldout_loss"]
    loss = rows[1].result.scores
    rows = [replace(rows[1], base=None, result=replace(rows[1].result, scores=replace(loss, benchmark="heldout_kl")))]
    table = result_table(rows, several_runs=False)
    assert table.columns[0][1].startswith("KL(base || model)")
    assert table.rows[0].score == f"{loss.loss:.4f} ± {loss.standard_error:.4f}" and table.rows[0].difference == "–"


@pytest.mark.parametrize(("changes", "said"), [
    ({"partial": True, "missing": 7}, "base: 7 samples are missing"),
    ({"grading_errors": 2}, "base: 2 answers could not be graded"),
    ({"ties": 3}, "base: 3 votes were tied"),
    (
        {"accuracy_by_truncated_as": {"incorrect": Mean(0.25, 0.1, 4), "graded": Mean(0.5, 0.1, 4)}},
        "base: accuracy 25.0 % with truncated answers incorrect, 50.0 % with truncated answers graded.",
    ),
])  # fmt: skip
def test_a_score_with_caveats_has_a_note_for_each(run, changes, said):
    path = run / "eval/base/ledger/scores.json"
    write_scores(path, replace(read_scores(path), **changes))
    assert any(note.startswith(said) for note in table_of(run).notes)


def test_a_table_names_how_truncated_answers_count(run):
    assert table_of(run).notes[0].endswith("; truncated answers count as incorrect.")
    for path in run.glob("eval/*/ledger/scores.json"):
        write_scores(path, replace(read_scores(path), truncated_as="graded"))
    assert table_of(run).notes[0].endswith("; truncated answers are graded by their text.")


def test_problems_and_sampling_are_named_once_or_by_run(tmp_path):
    one, two = made_run(tmp_path, "one"), made_run(tmp_path, "two")
    assert table_of(one, two).notes == (
        "ledger: 4 problems, greedy, at most 512 new tokens; truncated answers count as incorrect.",
    )
    for variant in ("base", "converted", "trained"):
        path = two / "eval" / variant / "ledger/scores.json"
        scores = read_scores(path)
        write_scores(path, replace(scores, fingerprint={**scores.fingerprint, "temperature": 0.6}))
        meta = path.with_name("meta.json")
        meta.write_text(meta.read_text().replace('"temperature": 0.0', '"temperature": 0.6'))
    assert table_of(one, two).notes[-1] == "Problems or sampling differ between the runs: compare within a run."
