"""Answers from OpenAI-compatible servers: many requests in flight, over several servers, whatever they do.

A request whose server fails goes back in line and to whichever server is free; the server rests, longer each time, and is tried
with a request of one token before it gets more. One thread runs the event loop; the caller's generator reads what it delivers.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lt_train.inference.requests import Answer, Request, Sampling
from lt_train.inference.servers.client import MakeMessages, ServerClient
from lt_train.inference.servers.completions_api import Abilities, Completion
from lt_train.inference.servers.pool import Server, ServerFailure, ServerSettings
from lt_train.inference.text import cut_at_stop_string, decode, thinking_tokens
from lt_train.recipe.reasoning_tags import THINK
from lt_train.runtime.errors import UserError

GIVEN_UP_IN_A_ROW = 3
"""Requests that used up all their attempts with no answer in between; then it is hardly the requests' fault."""

Delivered = tuple[Request, Completion, float]


class OpenAIBackend:
    """Servers that answer.

    Args:
        tokenizer: of the checkpoint that they serve. stop_ids: the tokens that end its answers (`text.special_tokens`).
        messages: gives a request's conversation, for servers that take nothing but messages.
        report: called with a line when a server fails.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        settings: ServerSettings,
        *,
        messages: MakeMessages | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.settings = settings
        self.messages = messages
        self.report = report

    def answers(
        self, requests: Sequence[Request], sampling: Sampling, watch: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[Answer]:
        """Answer every request, each as soon as it is done. What is in flight when the caller stops reading is dropped.

        Args:
            watch: called with the tokens of each answer before it is yielded.

        Raises:
            UserError: the servers are gone for good, refuse a request, or would answer something else than was asked. All that was
                finished has been yielded before.
        """
        if sampling.thinking_budget is not None:
            raise UserError(
                "thinking_budget: a server cannot close a thought in the middle. Use the built-in engine (backend: hybrid)"
            )
        for request, completion, seconds in self.completions(requests, sampling):
            answer = read_answer(self.tokenizer, self.stop_ids, request, completion, sampling, seconds)
            watch(answer.tokens)
            yield answer

    def completions(self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False) -> Iterator[Delivered]:
        """What the servers sent for each request, and the request's share of the time in seconds. Raises as `answers`."""
        if not requests:
            return
        run = _Run(self, requests, sampling, logprobs)
        run.thread.start()
        try:
            while (item := run.outbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            run.stop()


class _Run:
    """The requests of one call, on their way."""

    def __init__(self, backend: OpenAIBackend, requests: Sequence[Request], sampling: Sampling, logprobs: bool) -> None:
        self.settings = backend.settings
        self.report = backend.report
        self.client = ServerClient(backend.tokenizer, backend.stop_ids, backend.settings, backend.messages)
        self.requests = requests
        self.sampling = sampling
        self.logprobs = logprobs
        self.outbox: queue.SimpleQueue[Delivered | BaseException | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._in_thread, name="openai backend", daemon=True)
        self.loop = asyncio.new_event_loop()
        self.main = self.loop.create_task(self._answer_all())
        self.servers = [Server(url) for url in self.settings.urls]
        self.abilities: dict[str, Abilities] = {}
        self.attempts = [0] * len(requests)
        self.unanswered = len(requests)
        self.given_up: dict[int, str] = {}
        self.given_up_in_a_row = 0
        self.clock = SharedClock()

    def stop(self) -> None:
        """End whatever is still in flight, and the thread."""
        self.loop.call_soon_threadsafe(self.main.cancel)
        self.thread.join()
        self.loop.close()

    def _in_thread(self) -> None:
        try:
            self.loop.run_until_complete(self.main)
            self.outbox.put(None)
        except BaseException as error:  # goes up in the caller's thread
            self.outbox.put(error)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())

    async def _answer_all(self) -> None:
        self.settled: asyncio.Future[None] = self.loop.create_future()
        self.waiting: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for number in range(len(self.requests)):
            self.waiting.put_nowait(number)
        self.reviving = {server.url: asyncio.Lock() for server in self.servers}
        async with self.client:
            workers = [
                self.loop.create_task(self._work(server, lane))
                for lane in range(min(self.settings.concurrency, len(self.requests)))
                for server in self.servers
            ]
            try:
                await self.settled
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, server: Server, lane: int) -> None:
        """One lane to one server: take a request, ask, deliver; until all is settled."""
        try:
            while True:
                if not server.ready:
                    async with self.reviving[server.url]:
                        await self._revive(server)
                if lane > 0 and self.abilities[server.url].one_at_a_time:
                    return
                number = await self.waiting.get()
                if server.ready:
                    await self._ask(server, self.abilities[server.url], number)
                else:
                    self.waiting.put_nowait(number)
        except Exception as error:
            if not self.settled.done():
                self.settled.set_exception(error)

    async def _revive(self, server: Server) -> None:
        """Wait until the server has rested and answers a request of one token."""
        while not server.ready:
            await asyncio.sleep(server.resting_until - self.loop.time())
            asked_at = self.loop.time()
            try:
                self.abilities[server.url] = await self.client.learn(server.url, self.requests[0], self.sampling)
            except ServerFailure as failure:
                self._strike(server, failure, asked_at)
            else:
                server.ready = True

    async def _ask(self, server: Server, abilities: Abilities, number: int) -> None:
        asked_at = self.loop.time()
        request = self.requests[number]
        with self.clock.share(asked_at, self.loop.time) as share:
            try:
                completion = await self.client.complete(
                    server.url,
                    abilities,
                    request,
                    self.sampling,
                    logprobs=self.logprobs,
                    on_begin=lambda: server.gave_sign_of_life(asked_at),
                )
                check_finished(server.url, completion, self.sampling)
            except ServerFailure as failure:
                self._strike(server, failure, asked_at)
                self._put_back(number, server, failure)
                return
        server.gave_sign_of_life(asked_at)
        self.given_up_in_a_row = 0
        self.outbox.put((request, completion, share.seconds))
        self._settle_one()

    def _strike(self, server: Server, failure: ServerFailure, asked_at: float) -> None:
        server.strike(failure, asked_at, self.loop.time(), self.settings.backoff)
        rest = max(0.0, server.resting_until - self.loop.time())
        self.report(f"{server.url}: {failure}; it is asked again in {rest:.0f} s")
        if all(server.strikes >= self.settings.failures for server in self.servers):
            lines = [f"  {server.url}: {server.last_failure}" for server in self.servers]
            self._stop(
                UserError(
                    "\n".join(
                        [
                            f"no server answers any more; each failed {self.settings.failures} times in a row, at last so:",
                            *lines,
                            "Start them again (launch/ has the lines) and run the same command: it goes on with the answers that "
                            "are missing",
                        ]
                    )
                )
            )

    def _put_back(self, number: int, server: Server, failure: ServerFailure) -> None:
        self.attempts[number] += failure.blames_request
        if self.attempts[number] < self.settings.attempts:
            self.waiting.put_nowait(number)
            return
        self.given_up[number] = f"{server.url}: {failure}"
        self.given_up_in_a_row += 1
        if self.given_up_in_a_row >= GIVEN_UP_IN_A_ROW:
            self._stop(self._given_up_error())
        else:
            self._settle_one()

    def _settle_one(self) -> None:
        self.unanswered -= 1
        if self.unanswered == 0:
            if self.given_up:
                self._stop(self._given_up_error())
            elif not self.settled.done():
                self.settled.set_result(None)

    def _stop(self, error: UserError) -> None:
        if not self.settled.done():
            self.settled.set_exception(error)

    def _given_up_error(self) -> UserError:
        number, reason = next(iter(self.given_up.items()))
        request = self.requests[number]
        return UserError(
            f"{len(self.given_up)} of {len(self.requests)} requests failed {self.settings.attempts} times each, such as sample "
            f"{request.sample} of problem {request.problem}, at last so:\n  {reason}\nSee the server's log, then run the same "
            "command: it goes on with the answers that are missing"
        )


class SharedClock:
    """Divides the time among those who share it: the shares of all add up to the time in which there were any."""

    def __init__(self) -> None:
        self._sharing = 0
        self._each = 0.0  # seconds that one who was there all the time would have got
        self._until = 0.0

    def share(self, now: float, clock: Callable[[], float]) -> "_Share":
        return _Share(self, now, clock)

    def change(self, now: float, by: int) -> float:
        """Somebody comes (1) or goes (-1)."""
        if self._sharing:
            self._each += (now - self._until) / self._sharing
        self._until = now
        self._sharing += by
        return self._each


class _Share:
    def __init__(self, shared: SharedClock, now: float, clock: Callable[[], float]) -> None:
        self._shared, self._now, self._clock = shared, now, clock
        self.seconds = 0.0

    def __enter__(self) -> "_Share":
        self._begin = self._shared.change(self._now, 1)
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._shared.change(self._clock(), -1) - self._begin


def check_finished(url: str, completion: Completion, sampling: Sampling) -> None:
    """
    Raises:
        ServerFailure: the server broke the answer off. UserError: it cut the answer earlier than asked.
    """
    if completion.finish_reason not in ("stop", "length"):
        raise ServerFailure(f"it ended the answer with finish_reason {completion.finish_reason!r}")
    counted = completion.completion_tokens
    if completion.finish_reason == "length" and counted is not None and counted < sampling.max_new_tokens:
        raise UserError(
            f"{url} cut an answer off at {counted} tokens, not at max_new_tokens={sampling.max_new_tokens}: its context is too "
            "short. Start it with a longer one (vLLM: --max-model-len), or lower max_new_tokens"
        )


def read_answer(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    request: Request,
    completion: Completion,
    sampling: Sampling,
    seconds: float,
) -> Answer:
    """A server's completion as an answer like the built-in engine's.

    Where the server tells token ids, they are what is read. Otherwise its text is, which may lack special tokens, and the thought's
    tokens are counted by tokenizing it.
    """
    stopped = completion.finish_reason == "stop"
    if completion.token_ids is not None:
        ids = completion.token_ids
        text = decode(tokenizer, ids[:-1] if stopped and ids[-1] in stop_ids else ids)
        tokens = len(ids)
    else:
        text = _whole_text(tokenizer, request, completion)
        for stop_id in stop_ids if stopped else ():
            text = text.removesuffix(tokenizer.convert_ids_to_tokens(stop_id))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = completion.completion_tokens if completion.completion_tokens is not None else len(ids) + stopped
    cut = cut_at_stop_string(text, sampling.stop)
    return Answer(
        request=request,
        text=text if cut is None else cut,
        tokens=tokens,
        thinking_tokens=thinking_tokens(tokenizer, ids),
        finish_reason="stop" if stopped or cut is not None else "length",
        seconds=seconds,
    )


def _whole_text(tokenizer: PreTrainedTokenizerBase, request: Request, completion: Completion) -> str:
    """The text with the thought before it, as the model wrote it: parsers split off only what lies between the tags."""
    if completion.reasoning is None:
        return completion.text
    begin, end = THINK.opening, THINK.closing
    opened_by_prompt = decode(tokenizer, request.prompt_ids).rstrip().endswith(begin)
    closed = completion.text or completion.finish_reason == "stop"
    return f"{'' if opened_by_prompt else begin}{completion.reasoning}{end if closed else ''}{completion.text}"
