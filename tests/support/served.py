"""The server of `lt-train serve` in this process, over a small model."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from lt_train.serving.address import listening, url_of
from lt_train.serving.app import make_app
from lt_train.serving.checkpoint import Checkpoint
from lt_train.serving.draft_options import DraftOptions
from lt_train.serving.engine_thread import EngineThread

NAME = "tiny"


@contextmanager
def served(
    checkpoint: Checkpoint, *, max_slots: int = 8, max_waiting: int = 64, draft: DraftOptions | None = None
) -> Iterator[tuple[str, EngineThread]]:
    """Its address, and the engine behind it."""
    engine = EngineThread(checkpoint.engine(2**28, max_slots, draft), max_waiting)
    config = uvicorn.Config(make_app(NAME, checkpoint, engine), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with listening("127.0.0.1", 0) as taken:
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        try:
            yield url_of(taken), engine
        finally:
            engine.stop()
            server.should_exit = True
            thread.join()


def until(condition: object, seconds: float = 20) -> None:
    """Wait until a function returns something true."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def checkpoint_of(model, tokenizer) -> Checkpoint:
    return Checkpoint(Path("nowhere"), "made by a test", model, tokenizer, None)
