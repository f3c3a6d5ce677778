"""The openai package sends requests again after 10 ms rather than half a second, unless the server sends another time."""

import openai._base_client
import pytest


@pytest.fixture(autouse=True)
def retries_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
