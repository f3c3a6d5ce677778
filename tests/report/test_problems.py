"""The problems that a report shows beside the answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lt_train.benchmarks import Problem
from lt_train.recipe.evaluations import Eval, ProblemColumns
from lt_train.report.problems import known_problems
from lt_train.runtime.fingerprints import hash_of_json

ROW = {"ID": "2024-II-4", "Problem": "6 x 7?", "Solution": "By hand.", "Answer": 42}


def test_the_report_shows_the_problems_that_columns_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    columns = ProblemColumns(question="Problem", answer="Answer", id="ID")
    evaluation = Eval(benchmark="custom", path=str(path), max_new_tokens=8, columns=columns)
    fingerprint = {"problems": hash_of_json([["2024-II-4", "6 x 7?", ["42"], []]])}
    scores: Any = SimpleNamespace(benchmark="custom", by_problem=("2024-II-4",), fingerprint=fingerprint)
    known = known_problems(evaluation.model_dump(), scores)
    assert known.by_id == {"2024-II-4": Problem("2024-II-4", "6 x 7?", ("42",))}, known.unknown
