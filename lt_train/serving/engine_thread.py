"""The engine in a thread of its own, and the asyncio tasks that wait for its tokens."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from lt_train.inference.continuous_batch import NewToken, Running
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Request, Sampling
from lt_train.runtime.errors import UserError

USUAL_TOKENS = 4096
"""Of a sequence: the KV budget is divided into slots for such ones, and any may grow to the longest that there is room for."""


SECONDS_FOR_A_STEP = 5


class EngineStopped(Exception):
    """The engine takes no more requests, and finishes none: the server stops, or the engine failed."""


class Submission:
    """Requests that were submitted together, and their tokens as they come. Belongs to the event loop."""

    def __init__(self, thread: "EngineThread", count: int) -> None:
        self.open = count
        self._thread = thread
        self._arrived: asyncio.Queue[tuple[int, NewToken] | EngineStopped] = asyncio.Queue()

    async def tokens(self) -> AsyncIterator[tuple[int, NewToken]]:
        """Index of a request and its next token, until each has its answer.

        Raises:
            EngineStopped: there will be no more.
        """
        while self.open:
            arrived = await self._arrived.get()
            if isinstance(arrived, EngineStopped):
                raise arrived
            self.open -= arrived[1].answer is not None
            yield arrived

    def cancel(self) -> None:
        """Free what requests without an answer hold. Call it in any case."""
        self._thread.cancel(self)

    def put(self, arrived: tuple[int, NewToken] | EngineStopped) -> None:
        self._arrived.put_nowait(arrived)


class EngineThread:
    """Runs an engine for the tasks of one event loop.

    Args:
        max_waiting: requests that may wait for a slot.

    Attributes:
        longest: tokens of the longest sequence, prompt and answer.
        slots: sequences that run at a time. capacity: requests that may run or wait.
        failure: what ended the engine, where it was not `stop`.

    Raises:
        UserError: the KV budget does not hold one sequence.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.longest = engine.longest()
        if self.longest < 2:
            raise UserError(f"--kv-budget: {engine.budget:,} bytes do not hold one sequence. Fix: raise it")
        self._batch = engine.batch(engine.lay_out(engine.max_slots, self.longest, usual=min(self.longest, USUAL_TOKENS)))
        self.slots = self._batch.store.slots
        self.capacity = self.slots + max_waiting
        self.stop_ids, self.kv_budget = engine.stop_ids, engine.budget
        self.failure: BaseException | None = None
        self.stopped = False
        self._open: dict[Submission, int] = {}
        self._inbox: queue.SimpleQueue[tuple[Submission, Sequence[Request], Sampling] | Submission | None] = queue.SimpleQueue()
        self._places: dict[Running, tuple[Submission, int]] = {}

    @property
    def requests(self) -> int:
        """Requests that run or wait."""
        return sum(self._open.values())

    def start(self) -> None:
        """Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> Submission:
        """
        Raises:
            EngineStopped: the engine has ended.
        """
        if self.stopped:
            raise EngineStopped("the server is stopping")
        submission = Submission(self, len(requests))
        self._open[submission] = len(requests)
        self._inbox.put((submission, requests, sampling))
        return submission

    def cancel(self, submission: Submission) -> None:
        if self._open.pop(submission, 0):
            self._inbox.put(submission)

    def stop(self) -> None:
        """End the engine after the step in progress; open submissions get EngineStopped. May be called by a signal handler."""
        self.stopped = True
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the step in progress, but not for a long prompt."""
        self._thread.join(SECONDS_FOR_A_STEP)

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._take_messages():
                tokens = [(*self._places[token.sequence], token) for token in self._batch.step()]
                for _, _, token in tokens:
                    if token.answer is not None:
                        del self._places[token.sequence]
                self._call(self._deliver, tokens)
        except BaseException as error:
            self.failure = error
        self._call(self._end)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop, unless that was closed meanwhile."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _take_messages(self) -> bool:
        """Add and cancel what tasks requested; waits where there is nothing to do. False: stop."""
        while self._batch.is_empty or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, Submission):
                for sequence in [sequence for sequence, (owner, _) in self._places.items() if owner is message]:
                    self._batch.cancel(sequence)
                    del self._places[sequence]
            else:
                submission, requests, sampling = message
                for index, request in enumerate(requests):
                    self._places[self._batch.add(request, sampling)] = (submission, index)
        return True

    # In the event loop

    def _deliver(self, tokens: Sequence[tuple[Submission, int, NewToken]]) -> None:
        for submission, index, token in tokens:
            submission.put((index, token))
            if token.answer is not None and submission in self._open:
                self._open[submission] -= 1
                if not self._open[submission]:
                    del self._open[submission]

    def _end(self) -> None:
        self.stopped = True
        reason = "the server is stopping" if self.failure is None else f"the engine failed: {self.failure}"
        for submission in list(self._open):
            submission.put(EngineStopped(reason))
