"""Signals that stop a command: Ctrl-C (SIGINT), and SIGTERM, which SLURM sends before it preempts a job.

Either ends the command by an exception, so that what it holds is closed: temporary folders, the tracker, processes that it started.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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

    After a first SIGTERM further ones are ignored: launchers send several, and none may interrupt what the first one began.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(number)
