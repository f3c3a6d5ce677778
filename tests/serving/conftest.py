"""Clients of the servers under test read the trusted certificates once: each would by itself, in 50 ms."""

from collections.abc import Iterator
from functools import cache

import httpcore2
import pytest


@pytest.fixture(autouse=True, scope="session")
def certificates_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpcore2, "default_ssl_context", cache(httpcore2.default_ssl_context))
        yield
