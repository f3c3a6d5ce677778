from collections.abc import Iterator

import pytest

from tests.support.graders import graders_are_kept
from tests.support.processes import checks_of_exports_are_forked


@pytest.fixture(autouse=True, scope="package")
def started_processes() -> Iterator[None]:
    """The processes that check exports have torch and transformers from the start, those that grade sympy."""
    with checks_of_exports_are_forked(), graders_are_kept():
        yield
