"""Answers from OpenAI-compatible servers: many requests in flight, over several servers, whatever they do.

A request whose server fails goes back in line and to whichever server is free; the server rests, longer each time, and is probed
with a request of one token before it gets more.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lt_train.inference.requests import Answer, Request, Sampling, Watch
from lt_train.inference.servers.client import MakeMessages, ServerClient
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import Health, ServerFailure, ServerSettings
from lt_train.inference.text import cut_at_stop_string, decode, thinking_tokens
from lt_train.recipe.reasoning_tags import THINK
from lt_train.runtime.errors import UserError

GIVEN_UP_IN_A_ROW = 3
"""Requests that used up all their attempts with no answer in between; then it is hardly the requests' fault."""

Delivered = tuple[Request, Completion, float]


class OpenAIBackend:
    """Servers that answer.

    Args:
        tokenizer: of the checkpoint that they serve. stop_ids: the tokens that end its answers (`text.stop_tokens`).
        messages: makes a request's conversation, for servers that take nothing but messages.
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
            in_flight = _InFlight(self, requests, sampling, logprobs)
            try:
                runner.run(in_flight.start())
                for _ in requests:
                    delivered = runner.run(in_flight.next())
                    if delivered is not None:
                        yield delivered
                if in_flight.given_up:
                    raise in_flight.given_up_error()
            finally:
                runner.run(in_flight.stop())


class _InFlight:
    """The requests of one call on their way, each known by its index."""

    def __init__(self, backend: OpenAIBackend, requests: Sequence[Request], sampling: Sampling, logprobs: bool) -> None:
        self.backend = backend
        self.settings = backend.settings
        self.requests = requests
        self.sampling = sampling
        self.logprobs = logprobs
        self.attempts: Counter[int] = Counter()
        self.given_up: dict[int, str] = {}
        self.given_up_in_a_row = 0
        self.workers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        backend, settings = self.backend, self.settings
        self.loop = asyncio.get_running_loop()
        self.shared_time = SharedTime(self.loop.time)
        self.outbox: asyncio.Queue[Delivered | Exception | None] = asyncio.Queue()
        self.waiting: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for index in range(len(self.requests)):
            self.waiting.put_nowait(index)
        self.clients = [ServerClient(url, backend.tokenizer, backend.stop_ids, settings, backend.messages) for url in settings.urls]
        self.health = [Health() for _ in self.clients]
        for client, health in zip(self.clients, self.health, strict=True):
            reviving = asyncio.Lock()
            for lane in range(min(settings.concurrency, len(self.requests))):
                self.workers.append(self.loop.create_task(self._work(client, health, reviving, lane)))

    async def next(self) -> Delivered | None:
        """The next completion; None for a request that is given up."""
        item = await self.outbox.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def stop(self) -> None:
        """End whatever is still in flight."""
        for worker in self.workers:
            worker.cancel()
        await asyncio.gather(*self.workers, return_exceptions=True)
        for client in self.clients:
            await client.close()

    async def _work(self, client: ServerClient, health: Health, reviving: asyncio.Lock, lane: int) -> None:
        """One lane to one server: take a request, send it, deliver."""
        try:
            while True:
                async with reviving:
                    while not health.ready:
                        await self._revive(client, health)
                if lane > 0 and client.abilities is not None and client.abilities.one_at_a_time:
                    return
                index = await self.waiting.get()
                if health.ready:
                    await self._answer(client, health, index)
                else:  # it failed meanwhile
                    self.waiting.put_nowait(index)
        except Exception as error:
            self.outbox.put_nowait(error)

    async def _revive(self, client: ServerClient, health: Health) -> None:
        """Let the server rest, then see whether it answers a request of one token."""
        await asyncio.sleep(health.resting_until - self.loop.time())
        sent_at = self.loop.time()
        try:
            await client.probe(self.requests[0], self.sampling)
        except ServerFailure as failure:
            self._failed(client, health, failure, sent_at)
        else:
            health.ready = True

    async def _answer(self, client: ServerClient, health: Health, index: int) -> None:
        sent_at, entered = self.loop.time(), self.shared_time.enter()
        seconds = 0.0
        try:
            completion = await client.complete(self.requests[index], self.sampling, logprobs=self.logprobs)
            check_not_truncated(client.url, completion, self.sampling)
        except ServerFailure as failure:
            self._failed(client, health, failure, sent_at)
            self._put_back(client, index, failure)
            return
        finally:
            seconds = self.shared_time.leave(entered)
        health.succeeded()
        self.given_up_in_a_row = 0
        self.outbox.put_nowait((self.requests[index], completion, seconds))

    def _failed(self, client: ServerClient, health: Health, failure: ServerFailure, sent_at: float) -> None:
        if not health.failed(failure, sent_at, self.loop.time(), self.settings.backoff):
            return
        rest = health.resting_until - self.loop.time()
        self.backend.report(f"{client.url}: {failure}. Next attempt in {rest:.0f} s")
        if all(health.consecutive_failures >= self.settings.failures for health in self.health):
            lines = [f"  {url}: {health.last_failure}" for url, health in zip(self.settings.urls, self.health, strict=True)]
            heading = f"eval.servers: no server answers any more; each failed {self.settings.failures} times in a row, at last:"
            raise UserError("\n".join([heading, *lines, f"Fix: start them again (launch/ has the lines), then {_RESUME}"]))

    def _put_back(self, client: ServerClient, index: int, failure: ServerFailure) -> None:
        self.attempts[index] += failure.blames_request
        if self.attempts[index] < self.settings.attempts:
            self.waiting.put_nowait(index)
            return
        self.given_up[index] = f"{client.url}: {failure}"
        self.given_up_in_a_row += 1
        if self.given_up_in_a_row >= GIVEN_UP_IN_A_ROW:
            raise self.given_up_error()
        self.outbox.put_nowait(None)

    def given_up_error(self) -> UserError:
        index, reason = next(iter(self.given_up.items()))
        request = self.requests[index]
        return UserError(
            f"eval.servers: {len(self.given_up)} of {len(self.requests)} requests failed {self.settings.attempts} times each, such "
            f"as sample {request.sample} of problem {request.problem}, at last:\n  {reason}\nFix: see the server's log, then "
            f"{_RESUME}"
        )


_RESUME = "run the same command: it resumes with the answers that are missing"


class SharedTime:
    """Divides the time among the requests in flight: the shares of all add up to the time in which there were any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sharing = 0
        self._each = 0.0  # seconds that a request in flight from the start would have got
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


def check_not_truncated(url: str, completion: Completion, sampling: Sampling) -> None:
    """
    Raises:
        UserError: the server truncated the answer before max_new_tokens.
    """
    counted = completion.completion_tokens
    if completion.finish_reason == "length" and counted is not None and counted < sampling.max_new_tokens:
        raise UserError(
            f"eval.max_new_tokens: {sampling.max_new_tokens}: {url} truncated an answer at {counted} tokens: its context is too "
            "short. Fix: start it with a longer one (vLLM: --max-model-len), or lower max_new_tokens"
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
    """The text with the reasoning before it, as the model wrote it: parsers split off only what lies between the tags."""
    if not completion.reasoning:
        return completion.text
    opened_by_prompt = decode(tokenizer, request.prompt_ids).rstrip().endswith(THINK.opening)
    closed = completion.text or completion.finish_reason == "stop"
    return f"{'' if opened_by_prompt else THINK.opening}{completion.reasoning}{THINK.closing if closed else ''}{completion.text}"
