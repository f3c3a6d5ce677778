"""Grading in a process of its own, which is killed when an answer takes too long.

Nothing inside a process can end every computation: an exception that a signal raises is lost in a `__del__` or a gc hook, and C
code (an integer of ten billion digits) does not look at signals at all. So answers are judged in a child that imports little, one
at a time; a child that does not answer in time is killed and another one started.
"""

import contextlib
import logging
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from lt_train.evaluation.grading.extraction import Kind, choice_letter, extract
from lt_train.evaluation.grading.math_answers import Grade, describe, is_correct

SECONDS = 5
"""Of computing, for one answer. Real ones take milliseconds."""

PATIENCE = 6
"""Times as long by the clock, for machines that are busy with the model: a verdict should not depend on what else runs."""

TIMED_OUT = "Timeout:"
"""How the error of an answer begins that took too long."""

SECONDS_TO_START = 300.0
"""For a Python that imports sympy from a slow network disk."""

BYTES = 2 * 2**30
"""Address space of the child: a number that would fill the machine's memory fails in there."""

READY = b"ready"

# Neither multiprocessing's spawn nor a pool built on it: it imports the parent's main module again, which starts a user's script
# again if that has no `if __name__ == "__main__"`, and it refuses to work in daemonic processes.
PROGRAM = """
import sys
sys.path[:] = sys.argv[2:]
from lt_train.evaluation.grading.grader_process import serve
serve(int(sys.argv[1]))
"""


class CallFailed(Exception):
    """A call has no result; the message is the reason."""


class Grader:
    """Judges answers in a child process, each within a time limit, from any thread (one at a time).

        with Grader() as grader:
            grade = grader.grade(text, "5")

    The child starts with the first call or on entering the block, and ends with the block, or with this process.
    """

    def __init__(self, seconds: int = SECONDS, patience: int = PATIENCE) -> None:
        """
        Args:
            seconds: of processor time that one answer may take, and `patience` times as many by the clock.
        """
        self.seconds = seconds
        self.patience = patience
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_ready = False

    def __enter__(self) -> Self:
        with self._lock:
            if self._process is None:
                self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child. A later call starts another one."""
        with self._lock:
            self._end()

    def grade(self, text: str, reference: str, kind: Kind = "math", *, ended: bool = True) -> Grade:
        """Judge a generated text by the reference answer (LaTeX without its box, or plain text; a letter for a choice).

        An answer that takes too long or that math-verify cannot read is incorrect, and `error` is the reason.

        Args:
            ended: False: the text was truncated.

        Raises:
            ValueError: the reference answer to a choice is no letter from A to J.
            RuntimeError: no child can be started.
        """
        if kind == "choice" and choice_letter(reference) is None:
            raise ValueError(f"the reference answer to a multiple choice must be a letter from A to J, not {reference[:50]!r}")
        try:
            found = self.call(extract, text, kind, ended)
        except CallFailed as failure:
            return Grade(None, False, str(failure))
        if found is None:
            return Grade(None, False)
        try:
            return Grade(found.answer, self.call(is_correct, reference, found.answer, kind), None, found.extracted_from)
        except CallFailed as failure:
            return Grade(found.answer, False, str(failure), found.extracted_from)

    def equivalent(self, first: str, second: str) -> bool:
        """Whether two extracted answers are equal; where that cannot be judged, whether their texts are."""
        if first.strip() == second.strip():
            return True
        try:
            return bool(self.call(is_correct, first, second))
        except CallFailed:
            return False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `function` in the child. The function, its arguments and its result must be importable by name.

        Raises:
            CallFailed: it raised an exception, took too long, or its process died of it.
            RuntimeError: no child can be started.
        """
        request = pickle.dumps((function, arguments, self.seconds))
        with self._lock:
            # A child may have been killed from outside, as by a kernel that needs its memory. So a second one tries.
            for _ in range(2):
                try:
                    succeeded, result = self._ask(request)
                except (EOFError, OSError):
                    code = self._end()
                    if code == -signal.SIGXCPU:
                        self._start()  # now, so that it gets ready while the model generates
                        raise CallFailed(f"{TIMED_OUT} no verdict within {self.seconds} seconds of computing") from None
                    continue
                if succeeded:
                    return result
                raise CallFailed(result)
        raise CallFailed(f"the grading process died of this answer, twice ({describe_exit(code)})")

    def _ask(self, request: bytes) -> tuple[bool, Any]:
        """
        Raises:
            EOFError, OSError: the child has died.
            CallFailed: it took too long.
        """
        connection = self._ready_connection()
        try:
            connection.send_bytes(request)
            if connection.poll(self.patience * self.seconds):
                succeeded, result = pickle.loads(connection.recv_bytes())
                return succeeded, result
        except (EOFError, OSError):
            raise
        except BaseException:
            self._end()  # whatever it would still send is the reply to this request, not to the next
            raise
        self._end()
        raise CallFailed(f"{TIMED_OUT} no verdict within {self.patience * self.seconds} seconds")

    def _ready_connection(self) -> Connection:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        assert self._connection is not None
        if not self._is_ready:
            try:
                self._is_ready = self._connection.poll(SECONDS_TO_START) and self._connection.recv_bytes() == READY
            except (EOFError, OSError):
                pass
            except BaseException:
                self._end()
                raise
            if not self._is_ready:
                raise RuntimeError(f"the grading process did not start ({describe_exit(self._end())}); its error is on stderr")
        return self._connection

    def _start(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(there.fileno()), *map(os.path.abspath, sys.path)],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
            )
        self._connection = Connection(here.detach())
        self._is_ready = False

    def _end(self) -> int | None:
        """Kill the child, if there is one. Returns its exit status: negative for a signal."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        self._is_ready = False
        if process is None or connection is None:
            return None
        connection.close()
        process.kill()  # does nothing where it is dead already
        return process.wait()


def describe_exit(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def serve(descriptor: int) -> None:
    """Answer the requests that come over a socket until its other end is closed: the child's main function."""
    connection = Connection(descriptor)
    logging.disable(logging.CRITICAL)  # math-verify warns that its time has no limit
    limit_memory()
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # SIGXCPU would leave one
    connection.send_bytes(READY)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send_bytes(reply_to(request))


def reply_to(request: bytes) -> bytes:
    try:
        function, arguments, seconds = pickle.loads(request)
        limit_computing(seconds)
        return pickle.dumps((True, function(*arguments)))
    except Exception as error:
        return pickle.dumps((False, describe(error)))


def limit_computing(seconds: int) -> None:
    """Let the kernel end this process after `seconds` more of computing, whether its parent lives or not."""
    used = math.ceil(time.process_time())
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or used + seconds < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, hard))


def limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError, OSError):  # systems without this limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES if hard == resource.RLIM_INFINITY else min(BYTES, hard), hard))
