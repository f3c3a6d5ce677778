"""Answers from OpenAI-compatible servers: many requests in flight over several servers, which may fail at any moment.

A request whose server fails is queued again for any free server; the failed server rests, longer each time, and is probed with a
request of one token before it gets more.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lt_train.inference.requests import Answer, Request, Sampling, Watch
from lt_train.inference.servers.client import MakeMessages, ServerClient
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import ServerFailure, ServerSettings
from lt_train.inference.text import cut_at_stop_string, decode, thinking_tokens
from lt_train.recipe.reasoning_tags import THINK
from lt_train.runtime.errors import UserError

GIVEN_UP_IN_A_ROW = 3
"""Requests that used up all their attempts with no answer in between; then the cause is hardly the requests."""

RESUME = "run the same command: it resumes with the answers that are missing"

Delivered = tuple[Request, Completion, float]


@dataclass
class OpenAIBackend:
    """Servers that answer.

    Args:
        tokenizer: of the checkpoint that they serve. stop_ids: the tokens that end its answers (`text.stop_tokens`).
        messages: makes a request's conversation, for servers that take nothing but messages.
        report: called with a line when a server fails.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    settings: ServerSettings
    messages: MakeMessages | None = None
    report: Callable[[str], None] = lambda line: None

    def answers(self, requests: Sequence[Request], sampling: Sampling, watch: Watch = lambda tokens: None) -> Iterator[Answer]:
        """Answer every request, each as soon as it is done. What is in flight when the caller stops reading is dropped.

        Args:
            watch: called with the tokens of each answer before it is yielded.

        Raises:
            UserError: every server failed for good, one refuses a request, or one answers another prompt. All finished answers have
                been yielded before.
        """
        if sampling.thinking_budget is not None:
            raise UserError(
                "eval.thinking_budget: a server cannot close the reasoning in the middle. Fix: leave it out, or set eval.backend "
                "to hybrid (the built-in engine)"
            )
        for request, completion, seconds in self.completions(requests, sampling):
            answer = read_answer(self.tokenizer, self.stop_ids, request, completion, sampling, seconds)
            watch(answer.tokens)
            yield answer

    def completions(self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False) -> Iterator[Delivered]:
        """The servers' completion of each request, and the request's share of the time in seconds. Raises as `answers`.

        The event loop runs while the caller waits for the next one; meanwhile sockets keep what servers send.
        """
        if not requests:
            return
        with asyncio.Runner() as runner:
            delivered = _InFlight(self, requests, sampling, logprobs).delivered()
            try:
                while (item := runner.run(_next(delivered))) is not None:
                    yield item
            finally:
                runner.run(_end(delivered))


async def _next(delivered: AsyncGenerator[Delivered, None]) -> Delivered | None:
    return await anext(delivered, None)


async def _end(delivered: AsyncGenerator[Delivered, None]) -> None:
    await delivered.aclose()


class _InFlight:
    """The requests of one call, each known by its index, and the servers that answer them."""

    def __init__(self, backend: OpenAIBackend, requests: Sequence[Request], sampling: Sampling, logprobs: bool) -> None:
        self.report, self.settings = backend.report, backend.settings
        self.requests, self.sampling, self.logprobs = requests, sampling, logprobs
        self.clients = [
            ServerClient(url, backend.tokenizer, backend.stop_ids, backend.settings, backend.messages)
            for url in backend.settings.urls
        ]
        self.waiting: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        self.outbox: asyncio.Queue[Delivered | Exception | None] = asyncio.Queue()
        self.attempts: Counter[int] = Counter()
        self.given_up: dict[int, str] = {}
        self.given_up_in_a_row = 0
        self.shared_time = SharedTime(time.monotonic)

    async def delivered(self) -> AsyncGenerator[Delivered, None]:
        """Every completion as it comes; after the last one an error for the requests that are given up."""
        for index in range(len(self.requests)):
            self.waiting.put_nowait(index)
        lanes = range(min(self.settings.concurrency, len(self.requests)))
        workers = [asyncio.create_task(self._work(client, lane)) for client in self.clients for lane in lanes]
        try:
            for _ in self.requests:
                item = await self.outbox.get()
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    yield item
            if self.given_up:
                raise self._given_up_error()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for client in self.clients:
                await client.close()

    async def _work(self, client: ServerClient, lane: int) -> None:
        """One lane to one server: take a request, send it, deliver."""
        try:
            while True:
                async with client.reviving:
                    while not client.health.ready:
                        await self._revive(client)
                if lane > 0 and client.abilities is not None and client.abilities.is_transformers_serve:
                    return
                index = await self.waiting.get()
                if client.health.ready:
                    await self._answer(client, index)
                else:  # it failed meanwhile
                    self.waiting.put_nowait(index)
        except Exception as error:
            self.outbox.put_nowait(error)

    async def _revive(self, client: ServerClient) -> None:
        """Let the server rest, then see whether it answers a request of one token."""
        await asyncio.sleep(client.health.resting_until - time.monotonic())
        sent_at = time.monotonic()
        try:
            await client.probe(self.requests[0], self.sampling)
        except ServerFailure as failure:
            self._failed(client, failure, sent_at)
        else:
            client.health.ready = True

    async def _answer(self, client: ServerClient, index: int) -> None:
        sent_at, entered = time.monotonic(), self.shared_time.enter()
        seconds = 0.0
        try:
            completion = await client.complete(self.requests[index], self.sampling, logprobs=self.logprobs)
        except ServerFailure as failure:
            self._failed(client, failure, sent_at)
            self._put_back(client, index, failure)
            return
        finally:
            seconds = self.shared_time.leave(entered)
        client.health.succeeded()
        self.given_up_in_a_row = 0
        self.outbox.put_nowait((self.requests[index], completion, seconds))

    def _failed(self, client: ServerClient, failure: ServerFailure, sent_at: float) -> None:
        now = time.monotonic()
        if not client.health.failed(failure, sent_at, now, self.settings.backoff):
            return
        self.report(f"{client.url}: {failure}. Next attempt in {client.health.resting_until - now:.0f} s")
        if all(each.health.consecutive_failures >= self.settings.failures for each in self.clients):
            lines = [f"  {each.url}: {each.health.last_failure}" for each in self.clients]
            heading = f"eval.servers: no server answers any more; each failed {self.settings.failures} times in a row, at last:"
            raise UserError("\n".join([heading, *lines, f"Fix: start them again (launch/ has the lines), then {RESUME}"]))

    def _put_back(self, client: ServerClient, index: int, failure: ServerFailure) -> None:
        self.attempts[index] += failure.blames_request
        if self.attempts[index] < self.settings.attempts:
            self.waiting.put_nowait(index)
            return
        self.given_up[index] = f"{client.url}: {failure}"
        self.given_up_in_a_row += 1
        if self.given_up_in_a_row >= GIVEN_UP_IN_A_ROW:
            raise self._given_up_error()
        self.outbox.put_nowait(None)

    def _given_up_error(self) -> UserError:
        index, reason = next(iter(self.given_up.items()))
        request = self.requests[index]
        return UserError(
            f"eval.servers: {len(self.given_up)} of {len(self.requests)} requests failed {self.settings.attempts} times each, such "
            f"as sample {request.sample} of problem {request.problem}, at last:\n  {reason}\nFix: see the server's log, then "
            f"{RESUME}"
        )


class SharedTime:
    """Divides the time among the requests in flight: the shares of all add up to the time in which there were any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sharing = 0
        self._each = 0.0  # seconds of a request that is in flight from the start
        self._until = 0.0

    def enter(self) -> float:
        """A mark to `leave` with."""
        return self._change(1)

    def leave(self, entered: float) -> float:
        """The share, in seconds."""
        return self._change(-1) - entered

    def _change(self, by: int) -> float:
        now = self._clock()
        if self._sharing:
            self._each += (now - self._until) / self._sharing
        self._until = now
        self._sharing += by
        return self._each


def read_answer(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    request: Request,
    completion: Completion,
    sampling: Sampling,
    seconds: float,
) -> Answer:
    """A server's completion as an answer like the built-in engine's.

    Token ids are read where the server sends them. Otherwise its text is, which may lack special tokens, and the tokens of the
    reasoning are counted by tokenizing it.
    """
    stopped = completion.finish_reason == "stop"
    ids: Sequence[int] = completion.token_ids
    if ids:
        text = decode(tokenizer, ids[:-1] if stopped and ids[-1] in stop_ids else ids)
        tokens = len(ids)
    else:
        text = _text_with_reasoning(tokenizer, request, completion)
        for stop_id in stop_ids if stopped else ():
            text = text.removesuffix(str(tokenizer.convert_ids_to_tokens(stop_id)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = completion.completion_tokens if completion.completion_tokens is not None else len(ids) + stopped
    before_stop = cut_at_stop_string(text, sampling.stop)
    return Answer(
        request=request,
        text=text if before_stop is None else before_stop,
        tokens=tokens,
        thinking_tokens=thinking_tokens(tokenizer, ids),
        finish_reason="stop" if stopped or before_stop is not None else "length",
        seconds=seconds,
    )


def _text_with_reasoning(tokenizer: PreTrainedTokenizerBase, request: Request, completion: Completion) -> str:
    """The text with the reasoning before it, as the model wrote it: parsers split off only what is between the tags."""
    if not completion.reasoning:
        return completion.text
    opened_by_prompt = decode(tokenizer, request.prompt_ids).rstrip().endswith(THINK.opening)
    closed = completion.text or completion.finish_reason == "stop"
    return f"{'' if opened_by_prompt else THINK.opening}{completion.reasoning}{THINK.closing if closed else ''}{completion.text}"
