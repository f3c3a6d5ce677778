"""`lt-train serve`: the built-in engine behind an address, until a signal ends it."""

import socket
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from lt_train.runtime.units import format_bytes
from lt_train.serving.address import url_of
from lt_train.serving.app import make_app
from lt_train.serving.checkpoint import load_checkpoint
from lt_train.serving.draft_options import DraftOptions
from lt_train.serving.engine_thread import EngineThread

SECONDS_TO_STOP = 5
"""For clients to read what was sent before connections are closed."""


def serve(
    folder: Path, taken: socket.socket, kv_budget: int | None, max_waiting: int, draft: DraftOptions | None, console: Console
) -> None:
    """Serve the hybrid of a run or an export until SIGINT or SIGTERM.

    Args:
        taken: listens already (`listening`); clients wait there until the model is loaded.
        draft: of speculative decoding; None: none.

    Raises:
        UserError: nothing to serve in the folder, no such draft, or the KV budget is below one sequence.
    """
    checkpoint = load_checkpoint(folder)
    engine = EngineThread(checkpoint.engine(kv_budget, draft=draft), max_waiting)
    at_most = f"{engine.longest:,} tokens at most for prompt and answer"
    lines = [
        f"serving {folder}: {checkpoint.source}, {checkpoint.streaming}, {checkpoint.model.device.type}",
        *([] if draft is None else [f"draft: {draft}"]),
        f"KV cache {format_bytes(engine.kv_budget)}: {engine.slots} requests run, {max_waiting} wait; {at_most}",
        f"ready at {url_of(taken)}/v1",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    app = make_app(str(folder), checkpoint, engine)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SECONDS_TO_STOP)
    _Server(config, engine).run(sockets=[taken])
    if engine.failure is not None:
        raise engine.failure


class _Server(uvicorn.Server):
    """Ends answers in progress as soon as a signal comes, so that connections close by themselves; ends when the engine fails."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.stop()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second."""
        return await super().on_tick(counter) or self.engine.failure is not None
