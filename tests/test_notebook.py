"""docs/notebook.ipynb runs as it stands, and shows what its texts say."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests.support import processes
from tests.support.repository import REPOSITORY

NOTEBOOK = REPOSITORY / "docs/notebook.ipynb"


def saved(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@contextmanager
def kernel(folder: Path) -> Iterator[BlockingKernelClient]:
    """A client of Jupyter's kernel, which works in `folder`."""
    file, _ = write_connection_file(str(folder / "kernel.json"))
    process = processes.start_python([sys.executable, "-m", "ipykernel_launcher", "-f", file], folder / "log.txt", cwd=folder)
    client = BlockingKernelClient(connection_file=file)
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        process.terminate()
        processes.exit_code(process)


def run(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """What its cells print."""
    printed: list[str] = []

    def listen(message: dict[str, Any]) -> None:
        if message["content"].get("name") == "stdout":
            printed.append(message["content"]["text"])

    with kernel(folder) as client:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                reply = client.execute_interactive(cell.source, timeout=600, output_hook=listen)
                assert reply["content"]["status"] == "ok", reply["content"]["traceback"]
    return "".join(printed)


def accuracy(printed: str) -> dict[str, int]:
    found = re.findall(r"^(base|reach, trained|reach, untrained|lazy_ratio, untrained) +(\d+)%", printed, re.MULTILINE)
    return {label: int(percent) for label, percent in found}


@pytest.mark.slow
def test_the_notebook_runs_in_any_folder_and_training_brings_the_accuracy_back(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    found = accuracy(run(notebook, tmp_path))
    assert found["lazy_ratio, untrained"] < found["reach, untrained"] < 60 < found["reach, trained"] and found["base"] > 90
    assert (tmp_path / "runs/notebook/eval").is_dir()


def test_the_notebook_is_saved_with_its_outputs_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert set(accuracy(saved(notebook))) == {"base", "lazy_ratio, untrained", "reach, untrained", "reach, trained"}
    assert sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])) == 2
    assert NOTEBOOK.stat().st_size < 100_000 and str(REPOSITORY) not in NOTEBOOK.read_text(encoding="utf-8")
