"""docs/notebook.ipynb runs as it stands, and shows what its texts say."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.repository import ENVIRONMENT, REPOSITORY

NOTEBOOK = REPOSITORY / "docs/notebook.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def accuracy(notebook: nbformat.NotebookNode) -> dict[str, int]:
    found = re.findall(r"^(base|reach, trained|reach, untrained|lazy_ratio, untrained) +(\d+)%", printed(notebook), re.MULTILINE)
    return {label: int(percent) for label, percent in found}


@pytest.mark.slow
def test_the_notebook_runs_in_any_folder_and_training_brings_the_accuracy_back(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute(env=ENVIRONMENT)
    found = accuracy(notebook)
    assert found["lazy_ratio, untrained"] < found["reach, untrained"] < 60 < found["reach, trained"] and found["base"] > 90
    assert (tmp_path / "runs/notebook/eval").is_dir()


def test_the_notebook_is_saved_with_its_outputs_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert set(accuracy(notebook)) == {"base", "lazy_ratio, untrained", "reach, untrained", "reach, trained"}
    assert sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])) == 2
    assert NOTEBOOK.stat().st_size < 100_000 and str(REPOSITORY) not in NOTEBOOK.read_text(encoding="utf-8")
