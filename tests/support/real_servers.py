"""Servers in processes of their own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest


@contextmanager
def until_it_answers(process: Any, url: str, log: Path, seconds: float) -> Iterator[None]:
    """Wait for a server that was started, and end it afterwards. `process` is as of subprocess.Popen."""
    try:
        deadline = time.monotonic() + seconds
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def answers(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=5).is_success
    except httpx2.HTTPError:
        return False
