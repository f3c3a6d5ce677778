"""Problems of the user's own, from files as others publish them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lt_train.benchmarks import BENCHMARKS, Problem, load_problems
from lt_train.recipe.evaluations import Eval, ProblemColumns
from lt_train.recipe.schema import identity_of
from lt_train.runtime.errors import UserError
from tests.support.repository import REPOSITORY

CUSTOM = BENCHMARKS["custom"]

GSM8K = {"question": "6 x 7?", "answer": "Six sevens are <<6*7=42>>42.\n#### 42"}
AIME = {"ID": "2024-II-4", "Problem": "6 x 7?", "Solution": "By hand.", "Answer": 42}
OPEN_R1 = {"problem": "6 x 7?", "solution": "By hand.", "answer": "42", "uuid": "a-1", "generations": ["Hm. 41"]}
DAPO = {"prompt": [{"role": "user", "content": "6 x 7?"}], "reward_model": {"ground_truth": "42"}, "extra_info": {"index": "a-1"}}
OLYMPIAD = {"id": 1606, "question": "6 x 7?", "final_answer": ["42"], "solution": ["By hand."]}

PUBLISHED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    (GSM8K, {"question": "question"}, "0"),
    (AIME, {"question": "Problem", "answer": "Answer", "id": "ID"}, "2024-II-4"),
    (OPEN_R1, {"id": "uuid"}, "a-1"),
    (DAPO, {"question": "prompt.0.content", "answer": "reward_model.ground_truth", "id": "extra_info.index"}, "a-1"),
    (OLYMPIAD, {"question": "question", "answer": "final_answer.0"}, "1606"),
]


def custom(path: Path, columns: dict[str, str]) -> Eval:
    return Eval(benchmark="custom", path=str(path), max_new_tokens=8, columns=ProblemColumns(**columns))


def problems_of(tmp_path: Path, row: dict[str, Any], columns: dict[str, str]) -> tuple[Problem, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    chosen = custom(path, columns).columns
    assert chosen is not None
    return load_problems(CUSTOM, str(path), None, columns=chosen.model_dump()).problems


@pytest.mark.parametrize(("row", "columns", "name"), PUBLISHED, ids=["GSM8K", "AIME", "OpenR1-Math", "DAPO", "OlympiadBench"])
def test_rows_as_others_publish_them_are_read_by_their_columns(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], name: str
) -> None:
    assert problems_of(tmp_path, row, columns) == (Problem(name, "6 x 7?", ("42",)),)


def test_the_real_gsm8k_as_custom_has_the_answers_of_the_benchmark(shared_data: Path) -> None:
    path = str(shared_data / "gsm8k_test.jsonl")
    own = load_problems(CUSTOM, path, None, columns={"question": "question", "answer": "answer"})
    assert own == load_problems(BENCHMARKS["gsm8k"], path, None)


@pytest.mark.parametrize(
    ("columns", "reported"),
    [
        ({"question": "Question", "answer": "Answer"}, "field 'Question' is missing; the row has Answer, ID, Problem, Solution"),
        ({"question": "Problem", "answer": "Answer.0"}, r"field 'Answer\.0' is missing \(no field '0': 'Answer' holds a number\)"),
        ({}, "field 'problem' is missing; .* Fix: name the columns that hold them, such as columns: {question: Problem, answer: "),
    ],
)
def test_a_column_that_rows_do_not_have_is_an_error_that_names_theirs(
    tmp_path: Path, columns: dict[str, str], reported: str
) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {reported}"):
        problems_of(tmp_path, AIME, columns)


@pytest.mark.parametrize("row", [{}, {"uid": None}, {"uid": ""}])
def test_a_row_without_the_id_that_is_named_is_an_error_and_not_numbered(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: field 'uid' is (missing|None|'')"):
        problems_of(tmp_path, {"problem": "6 x 7?", "answer": "42", **row}, {"id": "uid"})
    (problem,) = problems_of(
        tmp_path, {"problem": "6 x 7?", "answer": "42", "id": ""}, {}
    )  # a CSV has no other way to leave it out
    assert problem.id == "0"


def test_an_answer_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: field 'answer' is nan"):
        problems_of(tmp_path, {"problem": "6 x 7?", "answer": float("nan")}, {})


@pytest.mark.parametrize("field", ["id", "problem", "answer"])
def test_half_of_a_character_is_an_error_with_its_place(tmp_path: Path, field: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: holds half of a character, '\\ud800'"):
        problems_of(tmp_path, {"id": "a", "problem": "6 x 7?", "answer": "42", field: "a\ud800b"}, {})


def test_two_rows_with_one_id_are_an_error_whatever_column_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(AIME)}\n" * 2)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a second problem with the id '2024-II-4'"):
        load_problems(CUSTOM, str(path), None, columns={"question": "Problem", "answer": "Answer", "id": "ID"})


def test_without_columns_an_evaluation_has_the_identity_that_it_had_before_there_were_any() -> None:
    assert "columns" not in identity_of(Eval(benchmark="aime24", max_new_tokens=8))


def test_the_columns_in_the_docs_are_those_of_a_custom_benchmark() -> None:
    text = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("  - {benchmark: custom")]
    assert len(lines) == 4
    for line in lines:
        Eval.model_validate(yaml.safe_load(line)[0])
