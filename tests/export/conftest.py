from collections.abc import Iterator

import pytest

from tests.support.processes import checks_of_exports_are_forked


@pytest.fixture(autouse=True, scope="package")
def forked_checks() -> Iterator[None]:
    """The processes that check exports have torch and transformers from the start."""
    with checks_of_exports_are_forked():
        yield
