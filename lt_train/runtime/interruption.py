"""Signals that stop a command: Ctrl-C (SIGINT), and SIGTERM, which SLURM sends before it preempts a job.

Either ends the command by an exception, so that what it holds is closed: temporary folders, the tracker, processes that it started.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer
from types import FrameType
from typing import Any

SECONDS_UNTIL_REPEATED = 0.05
"""From a signal whose exception Python dropped to the next: enough to be out of what dropped it."""


class Interrupted(BaseException):
    """A signal stops this process. Its text names the signal, and what was saved.

    It is no Exception, which libraries catch and pass over, and no KeyboardInterrupt, which typer turns into a bare exit code.
    """

    def __init__(self, number: int, detail: str = "") -> None:
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        super().__init__(f"stopped{by}{'; ' if detail else ''}{detail}")
        self.number = number
        self.exit_code = 128 + number
        """As a shell reports a process that a signal ended."""
        self.resumes = False
        """Whether the same command resumes (`resuming`)."""


@contextmanager
def raising_interrupted() -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM raise Interrupted in the main thread. A signal that is ignored stays ignored.

    After a first SIGTERM further ones are ignored: launchers send several, and none may interrupt what the first one began. Python
    drops an exception that is raised while it destroys an object; the signal of such a one comes again.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _interrupt)
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_repeat_if_dropped, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_held() -> Iterator[None]:
    """While the block runs, SIGTERM waits, also in what the block forks, until `end_at_sigterm` there.

    A forked process inherits the handler of `raising_interrupted`: an exception that it raises before the process can be stopped by
    one would be lost, and the process that sent it would wait for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_sigterm() -> None:
    """Let SIGTERM end this forked process at once, also one that came before."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def resuming() -> Iterator[None]:
    """The block keeps what it has done: where a signal stops it, the same command resumes, which Interrupted reports."""
    try:
        yield
    except Interrupted as stop:
        stop.resumes = True
        raise


def _repeat_if_dropped(otherwise: Callable[[Any], object], dropped: Any) -> None:
    if not isinstance(dropped.exc_value, Interrupted):
        otherwise(dropped)
        return
    number = dropped.exc_value.number
    signal.signal(number, _interrupt)
    Timer(SECONDS_UNTIL_REPEATED, os.kill, (os.getpid(), number)).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(number)
