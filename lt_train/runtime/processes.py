"""The processes of one launch (`deepspeed`, `torchrun`): which of them this is, which one prints, and how they end together.

The main process prints; the others print errors only. Both launchers end all processes on a machine, within seconds, once one of
them has failed; what is left to do here is to report the error once, and to exit at once.
"""

import logging
import math
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from lt_train.runtime.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_FOR_THE_LAUNCHER = 10.0  # it looks at its processes every second at most


@dataclass(frozen=True)
class Process:
    rank: int  # from 0, over all machines
    count: int  # processes of the launch
    launched: bool  # by deepspeed or torchrun, if only as one process

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and works in the run folder: rank 0."""
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"process {self.rank} of {self.count} on {socket.gethostname()}"


def this_process() -> Process:
    """This process, by the launcher's environment variables; without a launcher the only one.

    Raises:
        UserError: one of them is no number.
    """
    launched = number_in_environment("LOCAL_RANK", -1) >= 0
    return Process(number_in_environment("RANK", 0), number_in_environment("WORLD_SIZE", 1), launched)


def number_in_environment(name: str, missing: int) -> int:
    """
    Args:
        missing: what it is where the environment has no such variable.

    Raises:
        UserError: it is no whole number.
    """
    value = os.environ.get(name)
    try:
        return missing if value is None else int(value)
    except ValueError as error:
        raise UserError(
            f"{name}: {value!r}: no whole number. Fix: unset it, or let torchrun or deepspeed start the processes, which set it"
        ) from error


def check_environment(process: Process) -> None:
    """
    Raises:
        UserError: the launcher's variables do not say which process this is. Without LOCAL_RANK, accelerate would let each process
            on a GPU train alone; one with a rank beyond their number would wait for a first process that does not exist.
    """
    environment = os.environ
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in environment]
    if process.count > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: {process.count}: the environment has no {' and no '.join(missing)}, so this process cannot tell which of "
            f"{process.count} it is. Fix: start it with torchrun or deepspeed, which set them, or set them in each process; for "
            "one process unset WORLD_SIZE and RANK"
        )
    if process.rank not in range(process.count):
        raise UserError(
            f"RANK: {process.rank}: not below the number of processes, WORLD_SIZE, which is {process.count}. Fix: start the "
            "processes with torchrun or deepspeed, which set both; for one process unset RANK"
        )


def silence() -> None:
    """Keep this process, which is not the main one, from printing anything but its own errors.

    Standard output goes nowhere, also that of libraries written in C++; warnings and log records below errors are dropped.
    """
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def wait_for_the_launcher(process: Process, error: BaseException) -> None:
    """Wait for the launcher to end this process, where another process reports `error`.

    Most errors are the same in every process, and then the main one reports it. A lost connection means that another process has
    failed, and reported why, or was killed. Where the launcher does not end this one (on another machine), this returns, and the
    caller reports the error.
    """
    if not process.is_main or is_lost_connection(error):
        time.sleep(SECONDS_FOR_THE_LAUNCHER)


def wait_until(reached: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Wait for what another process of the launch is about to do; if that one fails, the launcher ends this one.

    The first pause between two looks is a tenth of a second, later ones are a fifth of the time waited, up to two seconds.
    Returns False where it has not come after `seconds`.
    """
    begun = time.monotonic()
    while not reached():
        waited = time.monotonic() - begun
        if waited > seconds:
            return False
        time.sleep(min(max(0.1, waited / 5), 2.0))
    return True


def is_taken_port(error: BaseException) -> bool:
    """Whether the port of the processes' rendezvous is used by another launch."""
    return _is_of_torch_distributed(error) and "EADDRINUSE" in str(error)


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error means that another process cannot be reached any more."""
    if _is_of_torch_distributed(error):  # NCCL, and the store that all processes share
        return not is_taken_port(error)
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()  # torch has no class for these


def _is_of_torch_distributed(error: BaseException) -> bool:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is not None and isinstance(error, distributed.DistError)


def end_with(parent: int) -> None:
    """End this process as soon as `parent`, which started it, has ended, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave(code: int) -> NoReturn:
    """End now. After a failure an orderly exit would wait for collectives that the other processes never join; after a success the
    threads of torch's collectives now and then abort it ("terminate called without an active exception"), and the launcher would
    report a finished training as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
