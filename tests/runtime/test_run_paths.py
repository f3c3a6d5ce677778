"""RunPaths is the one place that knows the names of a run's files."""

import ast
import re
from pathlib import Path

import lt_train
from lt_train.runtime import run_paths

PACKAGE = Path(lt_train.__file__).parent
OF_TRANSFORMERS = {"config.json"}


def file_names(path: Path) -> set[str]:
    """String constants of a module that are a file name, docstrings left out."""
    constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"[\w.-]+\.(jsonl?|yaml|png)", value)}


def test_no_other_module_spells_a_file_name_of_a_run():
    known = file_names(Path(run_paths.__file__))
    assert {"manifest.json", "measured.json", "scores.json", "log.jsonl", "layers.json"} <= known
    repeated = {
        str(path.relative_to(PACKAGE)): again
        for path in PACKAGE.rglob("*.py")
        if path != Path(run_paths.__file__) and (again := file_names(path) & known - OF_TRANSFORMERS)
    }
    assert not repeated
