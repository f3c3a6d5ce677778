"""`lt-train serve`: the built-in engine behind an address, until a signal ends it."""

import errno
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from lt_train.runtime.errors import UserError
from lt_train.runtime.units import format_bytes
from lt_train.serving.app import make_app
from lt_train.serving.checkpoint import load_checkpoint
from lt_train.serving.engine_thread import EngineThread

SECONDS_TO_STOP = 5
"""For clients to read what was sent before connections are closed."""


def serve(folder: Path, host: str, port: int, kv_budget: int | None, max_waiting: int, console: Console) -> None:
    """Serve the hybrid of a run or an export until SIGINT or SIGTERM.

    The address is taken before the model is loaded, so one that is in use costs no time, and clients wait for the model.

    Raises:
        UserError: nothing to serve in the folder, the address cannot be taken, or the KV budget is below one sequence.
    """
    with listening(host, port) as taken:
        checkpoint = load_checkpoint(folder)
        model, spec = checkpoint.model, checkpoint.model.spec
        engine = EngineThread(checkpoint.engine(kv_budget), max_waiting)
        at = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
        streaming = f"{len(spec.lazy_layers)} of {spec.num_layers} layers stream"
        at_most = f"{engine.longest:,} tokens at most for prompt and answer"
        lines = [
            f"serving {folder}: {checkpoint.source}, {streaming}, {model.device.type}",
            f"KV cache {format_bytes(engine.kv_budget)}: {engine.slots} requests run, {max_waiting} wait; {at_most}",
            f"ready at {at}/v1",
        ]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        config = uvicorn.Config(
            make_app(str(folder), checkpoint, engine),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SECONDS_TO_STOP,
        )
        _Server(config, engine).run(sockets=[taken])
    if engine.failure is not None:
        raise engine.failure


def listening(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: the address is in use, is none of this machine's, or needs more rights.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: {host}: no address ({error}). Fix: name this machine's, such as 127.0.0.1") from error
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a former server may still be closing
        taken.bind(address)
        taken.listen(128)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: {port}: in use at {host}. Fix: name another, or stop what listens there") from error
        setting = "--port" if error.errno == errno.EACCES else "--host"
        raise UserError(f"{setting}: {host}:{port}: {error.strerror}. Fix: name another") from error
    return taken


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
