from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.graders import graders_are_kept
from tests.support.processes import checks_of_exports_are_forked
from tests.support.tiny_run import write_inputs


@pytest.fixture(autouse=True, scope="package")
def started_processes() -> Iterator[None]:
    """The processes that check exports have torch and transformers from the start, those that grade sympy."""
    with checks_of_exports_are_forked(), graders_are_kept():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe and data of a tiny run, in a folder of their own."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder
