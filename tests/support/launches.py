"""Processes that another one starts, such as the ranks of a real `deepspeed` or `torchrun`, with their libraries imported.

The other one starts `WARM_PYTHON` where it would start python; that one requests a process from this one, which forks it.
"""

import json
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

from tests.support.processes import start_python
from tests.support.repository import ENVIRONMENT

WARM_PYTHON = Path(__file__).with_name("warm_python.py")

_starting = threading.Lock()
"""A process that multiprocessing starts reads the exit codes of those that ended, which are to be read once."""


@contextmanager
def new_pythons_are_forked() -> Iterator[dict[str, str]]:
    """The environment in which `WARM_PYTHON` finds this process, and torchrun `WARM_PYTHON`. At its end, what runs is killed."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := f"{folder}/socket")
        listener.listen()
        clients: list[socket.socket] = []
        accepting = threading.Thread(target=_accept, args=(listener, clients), daemon=True)
        accepting.start()
        try:
            yield ENVIRONMENT | {"LT_TRAIN_WARM_PYTHON": address, "PYTHON_EXEC": str(WARM_PYTHON)}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for client in clients:
                with suppress(OSError):  # its process has ended
                    client.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, clients: list[socket.socket]) -> None:
    with suppress(OSError):  # it was shut down
        while True:
            clients.append(listener.accept()[0])
            threading.Thread(target=_fork, args=(clients[-1],), daemon=True).start()


def _fork(connection: socket.socket) -> None:
    """One process, for one client: ended when the client is."""
    with suppress(BrokenPipeError), connection, connection.makefile("rw") as lines:
        order = json.loads(lines.readline())
        outputs = [Path(f"/proc/{order['client']}/fd/{number}") for number in (1, 2)]
        with _starting:
            process = start_python(
                [sys.executable, *python_arguments(order["arguments"])],
                outputs[0],
                errors=outputs[1],
                env=order["environment"],
                cwd=Path(order["folder"]),
                starter=order["parent"],
            )
        print(process.pid, file=lines, flush=True)
        if connection in wait([process.sentinel, connection]):
            process.kill()
        wait([process.sentinel])
        with _starting:
            process.join()
        print(process.exitcode, file=lines, flush=True)


def python_arguments(arguments: list[str]) -> list[str]:
    """-m MODULE, and its arguments: torchrun puts -u before them, and deepspeed an argument of the module."""
    own = [argument for argument in arguments[:1] if argument.startswith("--local_rank")]
    option, module, *rest = arguments[len(own) + (arguments[0] == "-u") :]
    return [option, module, *own, *rest]
