import json
from pathlib import Path

import pytest

from lt_train.dataset.loading import load_examples
from lt_train.evaluation.records import SampleRecord
from lt_train.pipeline.rejection_sampling import select_traces, write_traces
from lt_train.recipe.schema import Data, Prompt, Sample
from lt_train.runtime.errors import UserError


def answer(problem: str, sample: int, tokens: int, text: str = "", correct: bool = True, reason: str = "stop") -> SampleRecord:
    return SampleRecord(
        problem=problem,
        sample=sample,
        seed=1,
        prompt_hash="",
        text=text or f"{problem} {sample}",
        tokens=tokens,
        thinking_tokens=None,
        finish_reason=reason,
        extracted="1",
        extracted_from="boxed",
        score=float(correct),
        correct=correct,
        grading_error=None,
        seconds=0.1,
    )


def kept(records: list[SampleRecord], **settings) -> list[tuple[str, int]]:
    sample = Sample(benchmark="ledger", max_new_tokens=9, **settings)
    return [record.key for record in select_traces(records, sample).kept]


def test_of_each_problem_the_shortest_correct_answer_is_kept() -> None:
    records = [answer("b", 0, 30), answer("a", 0, 9, correct=False), answer("a", 1, 20), answer("a", 2, 10), answer("a", 3, 10)]
    assert kept(records) == [("a", 2), ("b", 0)]


def test_all_correct_answers_are_kept_but_duplicates_only_once() -> None:
    records = [answer("a", 0, 5, "x"), answer("a", 1, 5, " x\n"), answer("a", 2, 7, "y"), answer("b", 0, 5, "x")]
    assert kept(records, keep="all") == [("a", 0), ("a", 2), ("b", 0)]


def test_answers_that_are_truncated_are_not_kept() -> None:
    assert kept([answer("a", 0, 9, reason="length"), answer("b", 0, 9)]) == [("b", 0)]


def test_lengths_outside_the_limits_are_left_out() -> None:
    records = [answer(problem, 0, tokens) for problem, tokens in (("a", 4), ("b", 5), ("c", 9), ("d", 10))]
    assert kept(records, min_tokens=5, max_tokens=9) == [("b", 0), ("c", 0)]


def test_a_budget_takes_the_problems_with_the_shortest_answers() -> None:
    records = [answer("a", 0, 50), answer("b", 0, 10), answer("c", 0, 30), answer("d", 0, 20)]
    assert kept(records, token_budget=60) == [("b", 0), ("d", 0), ("c", 0)]
    assert kept(records, token_budget=59) == [("b", 0), ("d", 0)]


def test_the_choice_does_not_depend_on_the_order_of_the_records() -> None:
    records = [answer(problem, sample, 10 + sample % 3) for problem in "abc" for sample in range(5)]
    assert kept(records) == kept(records[::-1])


def test_counts_show_what_became_of_every_answer() -> None:
    records = [answer("a", 0, 5, "x"), answer("a", 1, 5, "x"), answer("a", 2, 50), answer("b", 0, 5, correct=False)]
    counts = select_traces(records, Sample(benchmark="ledger", max_new_tokens=9, max_tokens=9)).counts
    assert counts == {
        "generated": 4,
        "correct": 3,
        "of the requested length": 2,
        "without duplicates": 1,
        "kept": 1,
        "problems": 2,
        "problems with a kept answer": 1,
        "tokens": 5,
    }


def test_what_is_written_is_training_data_with_the_same_prompt_and_the_whole_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("data/tiny-reasoner")
    text = "1. a>b3=3\n\\boxed{3}"
    selection = select_traces([answer("p", 0, 9, text)], Sample(benchmark="ledger", max_new_tokens=9))
    write_traces(tmp_path, selection, {"p": "Start at a."})
    data = Data(source=str(tmp_path / "traces.jsonl"), format="prompt_response", max_length=200)
    (example,) = load_examples(data, Prompt(), tokenizer, model_max_length=200, seed=0, eos_ids=[tokenizer.eos_token_id]).train
    assert tokenizer.decode(example.answer_ids) == text + tokenizer.eos_token
    assert "Start at a." in tokenizer.decode(example.prompt_ids)
    assert json.loads((tmp_path / "counts.json").read_text())["kept"] == 1


@pytest.mark.parametrize(
    ("correct", "reported"),
    [(False, r"generated 1, correct 0.* Fix: raise sample\.samples"), (True, r"correct 1.* Fix: raise sample\.token_budget")],
)
def test_nothing_to_keep_is_an_error_with_the_counts(tmp_path: Path, correct: bool, reported: str) -> None:
    sample = Sample(benchmark="ledger", max_new_tokens=9, token_budget=8)
    with pytest.raises(UserError, match=reported):
        write_traces(tmp_path, select_traces([answer("a", 0, 9, correct=correct)], sample), {"a": "?"})
    assert not list(tmp_path.iterdir())
