from collections.abc import Iterator

import pytest

from tests.support.processes import checks_of_exports_are_forked


@pytest.fixture(autouse=True, scope="package")
def forked_checks() -> Iterator[None]:
    """The processes that check exports have torch and transformers from the start; `new_interpreter` starts them as users do."""
    with checks_of_exports_are_forked():
        yield


@pytest.fixture
def new_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr("lt_train.export.verify.subprocess", subprocess)
