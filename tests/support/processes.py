"""Processes of a test that begin with everything imported: a new interpreter takes ten seconds for torch, TRL and DeepSpeed.

They are forked from a server, one for each process of pytest, that has imported those and done nothing else. What is killed, what
trains with others and what is known by its exit code starts here; where the start itself is tested there is `subprocess`.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.repository import ENVIRONMENT

IMPORTED = ["deepspeed", "pytest", "lt_train.pipeline.run", "lt_train.training.trainer", "lt_train.export.checkpoint"]

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(IMPORTED)


def start(function: Callable[..., Any], *arguments: Any, output: Path, **environment: str) -> ForkServerProcess:
    """Call a function that can be imported by its name. What it prints is appended to `output`, a traceback too."""
    process = _forked.Process(target=_call, args=(function, arguments, output, ENVIRONMENT | environment, os.getcwd()))
    process.start()
    return process


def start_ranks(function: Callable[..., Any], *arguments: Any, outputs: Path, world_size: int = 2) -> list[ForkServerProcess]:
    """Call it in the processes of one launch, with the environment that launchers set; rank 0 prints into `outputs`/0.txt."""
    outputs.mkdir(parents=True, exist_ok=True)
    launch = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    launch["MASTER_PORT"] = str(free_port())
    return [
        start(function, *arguments, output=outputs / f"{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **launch)
        for rank in range(world_size)
    ]


def exit_code(process: ForkServerProcess, seconds: float = 300) -> int:
    """Wait for its end. That of a process which a signal ended is the signal's number below zero."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process has not ended within {seconds} s")
    return process.exitcode


def call_in_ranks(function: Callable[..., Any], *arguments: Any, outputs: Path) -> list[tuple[int, str]]:
    """Exit code and output of each of two ranks."""
    ranks = start_ranks(function, *arguments, outputs=outputs)
    return [(exit_code(process), (outputs / f"{rank}.txt").read_text()) for rank, process in enumerate(ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], output: Path, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)
