import json
import subprocess
import sys
from pathlib import Path

import pytest

from lt_train.benchmarks import BENCHMARKS, Problem, load_problems, reading
from lt_train.runtime.errors import UserError

LEDGER = BENCHMARKS["ledger"]


CUSTOM = BENCHMARKS["custom"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gpqa_row(number: int) -> dict[str, str]:
    return {
        "Record ID": f"rec{number}",
        "Question": f"Which is number {number}?\n",
        "Correct Answer": "right",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "Subdomain": "Genetics",
    }


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [("aime24", "aime24.jsonl", 30), ("math500", "math500.jsonl", 500), ("gsm8k", "gsm8k_test.jsonl", 1319)],
)
def test_the_real_files_load_with_all_their_problems(shared_data: Path, name: str, file: str, count: int) -> None:
    loaded = load_problems(BENCHMARKS[name], str(shared_data / file), limit=None)
    assert len(loaded.problems) == loaded.available == count
    assert all(problem.text and problem.answer for problem in loaded.problems)


def test_gsm8k_answers_are_what_stands_behind_the_marker(shared_data: Path) -> None:
    first = load_problems(BENCHMARKS["gsm8k"], str(shared_data / "gsm8k_test.jsonl"), limit=1).problems[0]
    assert first.answer == "18"
    assert first.text.startswith("Janet")
    assert first.id == "0"


def test_the_ledger_that_comes_along_loads_from_its_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    loaded = load_problems(LEDGER, path=None, limit=5)
    assert len(loaded.problems) == 5
    assert loaded.available >= 1500


@pytest.mark.parametrize(
    ("name", "source", "split", "subset"),
    [
        ("aime24", "HuggingFaceH4/aime_2024", "train", None),
        ("aime25", "math-ai/aime25", "test", None),
        ("amc23", "math-ai/amc23", "test", None),
        ("gpqa_diamond", "Idavidrein/gpqa", "train", "gpqa_diamond"),
        ("math500", "HuggingFaceH4/MATH-500", "test", None),
        ("gsm8k", "openai/gsm8k", "test", "main"),
    ],
)
def test_without_a_path_the_part_of_that_name_is_requested_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, source: str, split: str, subset: str | None
) -> None:
    requested = []
    benchmark = BENCHMARKS[name]

    def rows_of_the_hub(source: str, split: str, subset: str | None = None) -> list:
        requested.append((source, split, subset))
        row = dict.fromkeys(benchmark.fields, "#### 1")
        return [(f"hub, row {number}", row) for number in range(benchmark.count)]

    monkeypatch.setattr(reading.sources, "load_rows", rows_of_the_hub)
    assert load_problems(benchmark, path=None, limit=None).available == benchmark.count
    assert requested == [(source, split, subset)]


def test_a_wrong_number_of_problems_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "aime.jsonl", [{"problem": "?", "answer": "1"}] * 29)
    with pytest.raises(UserError, match=r"29 problems, but aime24 has 30"):
        load_problems(BENCHMARKS["aime24"], path, limit=None)


def test_limit_does_not_hide_a_wrong_number_of_problems(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "aime.jsonl", [{"problem": "?", "answer": "1"}] * 29)
    with pytest.raises(UserError, match="29 problems"):
        load_problems(BENCHMARKS["aime24"], path, limit=4)


def test_limit_takes_the_first_problems_and_remembers_how_many_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"problem": f"{n}?", "answer": n} for n in range(7)])
    loaded = load_problems(LEDGER, path, limit=2)
    assert loaded.problems == (Problem("0", "0?", ("0",)), Problem("1", "1?", ("1",)))
    assert loaded.available == 7


def test_problems_keep_the_ids_their_rows_have(tmp_path: Path) -> None:
    rows = [{"id": 60, "problem": "?", "answer": "1"}, {"unique_id": "test/7.json", "problem": "?", "answer": "1"}]
    loaded = load_problems(LEDGER, write_rows(tmp_path / "own.jsonl", rows), limit=None)
    assert [problem.id for problem in loaded.problems] == ["60", "test/7.json"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "1"}, "'problem' is missing; the row has answer, question"),
        ({"problem": "?"}, "'answer' is missing"),
        ({"problem": "?", "answer": None}, "'answer' is None"),
        ({"problem": "?", "answer": True}, "'answer' is True"),
        ({"problem": ["?"], "answer": "1"}, r"'problem' is \['\?'\]"),
        ({"problem": "?", "answer": "  "}, "'answer' is empty"),
    ],
)
def test_a_row_without_its_fields_is_named_by_file_and_line(tmp_path: Path, row: dict, said: str) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"problem": "?", "answer": "1"}, row])
    with pytest.raises(UserError, match=rf"own\.jsonl:2: field {said}"):
        load_problems(LEDGER, path, limit=1)


def test_a_gsm8k_answer_without_its_marker_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"question": "?", "answer": "It is 18."}])
    with pytest.raises(UserError, match=r"own\.jsonl:1: .*no answer behind '####'"):
        load_problems(BENCHMARKS["gsm8k"], path, limit=None)


def test_two_problems_with_one_id_are_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"id": 3, "problem": "?", "answer": "1"}] * 2)
    with pytest.raises(UserError, match=r"own\.jsonl:2: a second problem with the id '3'"):
        load_problems(LEDGER, path, limit=None)


def test_a_file_without_problems_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no problems in it"):
        load_problems(LEDGER, write_rows(tmp_path / "own.jsonl", []), limit=None)


def test_a_file_of_ones_own_needs_only_problems_and_answers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [{"problem": "1 + 1?", "answer": 2}, {"problem": "Half?", "answer": 0.5}])
    assert load_problems(CUSTOM, path, limit=None).problems == (Problem("0", "1 + 1?", ("2",)), Problem("1", "Half?", ("0.5",)))


def test_a_file_of_ones_own_must_be_named() -> None:
    with pytest.raises(UserError, match=r"custom: path: missing\. Fix: set `path`"):
        load_problems(CUSTOM, None, limit=None)


def test_amc23_answers_that_are_whole_floats_are_whole_numbers(tmp_path: Path) -> None:
    rows = [{"id": n, "question": f"{n}?", "answer": 27.0, "url": "…"} for n in range(40)]
    loaded = load_problems(BENCHMARKS["amc23"], write_rows(tmp_path / "amc.jsonl", rows), limit=1)
    assert loaded.problems == (Problem("0", "0?", ("27",)),)


def test_aime25_rows_load(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}?", "answer": "70", "id": str(n)} for n in range(30)]
    loaded = load_problems(BENCHMARKS["aime25"], write_rows(tmp_path / "aime.jsonl", rows), limit=None)
    assert loaded.problems[29] == Problem("29", "29?", ("70",))


def test_gpqa_shows_four_options_in_an_order_that_depends_on_the_problem_only(tmp_path: Path) -> None:
    rows = [gpqa_row(number) for number in range(198)]
    gpqa = BENCHMARKS["gpqa_diamond"]
    problems = load_problems(gpqa, write_rows(tmp_path / "gpqa.jsonl", rows), limit=None).problems
    backwards = load_problems(gpqa, write_rows(tmp_path / "back.jsonl", rows[::-1]), limit=None).problems
    assert {problem.id: problem for problem in problems} == {problem.id: problem for problem in backwards}
    for problem in problems:
        listed = dict(line[1:].split(") ") for line in problem.text.splitlines() if line.startswith("("))
        assert sorted(listed.values()) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert listed[problem.answer] == "right"
    shares = [sum(problem.answer == letter for problem in problems) / 198 for letter in "ABCD"]
    assert all(0.15 < share < 0.35 for share in shares)


def test_gpqa_states_the_question_and_how_to_answer(tmp_path: Path) -> None:
    rows = [gpqa_row(number) for number in range(198)]
    text = load_problems(BENCHMARKS["gpqa_diamond"], write_rows(tmp_path / "gpqa.jsonl", rows), limit=1).problems[0].text
    assert text.startswith("What is the correct answer to this question: Which is number 0?\n\nChoices:\n(A) ")
    assert text.endswith("\n\nAnswer with the letter of one choice.")


def test_every_benchmark_goes_by_its_name_and_has_problems_from_somewhere() -> None:
    assert {"aime24", "aime25", "math500", "gsm8k", "amc23", "gpqa_diamond", "ledger", "custom"} <= BENCHMARKS.keys()
    assert {"needle", "passkey", "copying", "longbench_hotpotqa", "longbench_repobench-p"} <= BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.source or benchmark.generated or benchmark is CUSTOM


def test_naming_the_benchmarks_loads_no_large_library() -> None:
    code = (
        "import sys; import lt_train.benchmarks; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'math_verify', 'jieba') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
