"""Requests to one server: learning what it takes, and asking for one completion. All of it in an event loop."""

import asyncio
import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from lt_train.inference.requests import Request, Sampling
from lt_train.inference.servers.completions_api import (
    NEUTRAL,
    Abilities,
    Completion,
    CompletionReader,
    PromptWay,
    request_body,
    unknown_settings,
)
from lt_train.inference.servers.pool import ServerFailure, ServerSettings
from lt_train.inference.text import decode
from lt_train.runtime.errors import UserError

Message = Mapping[str, str]
MakeMessages = Callable[[Request], Sequence[Message]]

RETRIED = {408, 409, 425, 429}
"""HTTP states below 500 that asking again may mend."""

LATER = {429, 502, 503, 504}
"""HTTP states that say nothing about the request itself."""

CONNECT_SECONDS = 15.0
EXCERPT = 500  # characters of a server's own words


class ServerClient:
    """Talks to the servers of `settings`. Use as `async with`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        settings: ServerSettings,
        messages: MakeMessages | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.settings = settings
        self.messages = messages

    async def __aenter__(self) -> "ServerClient":
        headers = {"Authorization": f"Bearer {self.settings.api_key}"} if self.settings.api_key else {}
        self._http = httpx.AsyncClient(
            headers=headers, limits=httpx.Limits(max_connections=None), timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def learn(self, url: str, example: Request, sampling: Sampling) -> Abilities:
        """Find out, with requests of one token, how a server takes prompts and which settings it knows.

        Raises:
            ServerFailure: it is not there, or breaks.
            UserError: it takes no prompts from us, or would sample otherwise than asked.
        """
        async with _limit(self.settings.timeout, "it gave no first token"):
            transformers_serve = await self._is_transformers_serve(url)
            model = self.settings.model
            if model is None and not transformers_serve:  # that one lists what lies in the hub cache, not what it serves
                model = await self._only_model(url)
            way = await self._prompt_way(url, example, model)
            fields = frozenset() if transformers_serve else await self._known_fields(url, example, way, model)
        abilities = Abilities(way, model, fields, generation_config=transformers_serve)
        unknown = unknown_settings(abilities, sampling)
        if unknown:
            raise UserError(
                f"{url} does not know {' and '.join(unknown)}: its answers would be sampled otherwise than the recipe says. Leave "
                f"{' and '.join(unknown)} out of the evaluation, or use a server that knows them, such as vLLM"
            )
        return abilities

    async def complete(
        self,
        url: str,
        abilities: Abilities,
        request: Request,
        sampling: Sampling,
        *,
        logprobs: bool = False,
        on_begin: Callable[[], None] = lambda: None,
    ) -> Completion:
        """Ask for one completion.

        Args:
            on_begin: called with the first sign that the answer is being written.

        Raises:
            ServerFailure: asking again may help. UserError: it would not.
        """
        prompt = self._prompt(abilities.way, request)
        body = request_body(abilities, prompt, sampling, request.seed, self.stop_ids, logprobs=logprobs)
        async with _limit(self.settings.timeout, "it took longer than the time limit for one answer (timeout)"):
            completion = await self._ask(url + abilities.path, body, on_begin)
        check_prompt_tokens(url, abilities.way, request, completion)
        return completion

    async def _ask(self, address: str, body: Mapping[str, Any], on_begin: Callable[[], None]) -> Completion:
        reader = CompletionReader()
        try:
            async with self._http.stream("POST", address, json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise refused(response)
                if "text/event-stream" in response.headers.get("content-type", ""):
                    await self._read_stream(response, reader, on_begin)
                else:
                    reader.add((await response.aread()).decode("utf-8", errors="replace"))
        except httpx.HTTPError as error:
            raise _connection_failure(error) from error
        return reader.completion()

    async def _read_stream(self, response: httpx.Response, reader: CompletionReader, on_begin: Callable[[], None]) -> None:
        lines = response.aiter_lines()
        while True:
            stall = self.settings.stall if reader.choices else None
            async with _limit(stall, f"it sent nothing more for {self.settings.stall:g} s in the middle of an answer (stall)"):
                line = await anext(lines, None)
            if line is None:
                return
            reader.add_line(line)
            if reader.choices:
                on_begin()

    def _prompt(self, way: PromptWay, request: Request) -> Any:
        if way == "tokens":
            return list(request.prompt_ids)
        if way == "text":
            text = text_of_prompt(self.tokenizer, request.prompt_ids)
            if text is None:
                raise UserError(
                    f"problem {request.problem}: its prompt, written as text, is tokenized to other tokens, and this server takes "
                    "no token ids. Use a server that takes them, such as vLLM"
                )
            return text
        assert self.messages is not None
        return [dict(message) for message in self.messages(request)]

    async def _is_transformers_serve(self, url: str) -> bool:
        try:
            response = await self._http.get(f"{url}/openapi.json")
        except httpx.HTTPError as error:
            raise _connection_failure(error) from error
        try:
            return {"/load_model", "/reset", "/v1/completions"} <= set(response.json()["paths"])
        except (ValueError, KeyError, TypeError):
            return False

    async def _only_model(self, url: str) -> str | None:
        """The one model that the server lists; None where it lists nothing we can read."""
        try:
            response = await self._http.get(f"{url}/v1/models")
        except httpx.HTTPError as error:
            raise _connection_failure(error) from error
        if response.status_code in RETRIED or response.status_code in LATER:
            raise refused(response)
        try:
            names = [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return None
        if len(names) > 1:
            raise UserError(f"{url} serves several models: {', '.join(names[:8])}. Say which one: served_model")
        return names[0] if names else None

    async def _prompt_way(self, url: str, example: Request, model: str | None) -> PromptWay:
        refusals = []
        ways: list[PromptWay] = ["tokens"]
        if text_of_prompt(self.tokenizer, example.prompt_ids) is not None:
            ways.append("text")
        if self.messages is not None:
            ways.append("messages")
        for way in ways:
            try:
                await self._try(url, example, way, model)
                return way
            except UserError as error:
                refusals.append(f"  {way}: {error}")
        raise UserError("\n".join([f"{url} takes no prompt from us:", *refusals, _MODEL_HINT]))

    async def _known_fields(self, url: str, example: Request, way: PromptWay, model: str | None) -> frozenset[str]:
        """A server knows a field if it takes a right value and refuses a wrong one; one that ignores it takes both."""
        known = []
        for name, value in NEUTRAL.items():
            try:
                await self._try(url, example, way, model, {name: {"not": "a value"}})
            except (UserError, ServerFailure):
                try:
                    await self._try(url, example, way, model, {name: value})
                    known.append(name)
                except UserError:
                    continue
        return frozenset(known)

    async def _try(
        self, url: str, example: Request, way: PromptWay, model: str | None, more: Mapping[str, object] | None = None
    ) -> None:
        abilities = Abilities(way, model, frozenset(), generation_config=False)
        body = request_body(abilities, self._prompt(way, example), _ONE_TOKEN, 0, ()) | {"stream": False}
        del body["stream_options"]
        completion = await self._ask(url + abilities.path, body | dict(more or {}), lambda: None)
        check_prompt_tokens(url, way, example, completion)


_ONE_TOKEN = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=1)
_MODEL_HINT = "Is it an OpenAI-compatible server, and is served_model the name of a model that it serves?"


def text_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str | None:
    """A text that a server, tokenizing it as `tokenizer(text)` does, turns into exactly these tokens; None if there is none.

    A tokenizer that writes a beginning-of-sequence token by itself must not get that of the chat template as well.
    """
    for ids in (prompt_ids, prompt_ids[1:]):
        text = decode(tokenizer, ids)
        if tuple(tokenizer(text)["input_ids"]) == tuple(prompt_ids):
            return text
    return None


def check_prompt_tokens(url: str, way: PromptWay, request: Request, completion: Completion) -> None:
    """
    Raises:
        UserError: the server read another number of prompt tokens than we sent, or does not say how many where it tokenizes.
    """
    if completion.prompt_tokens is None:
        if way == "tokens":
            return
        raise UserError(
            f"{url} does not report usage.prompt_tokens, so whether it reads the same prompt as the model was trained with cannot "
            "be told. Use a server that takes prompts as token ids, such as vLLM"
        )
    if completion.prompt_tokens != len(request.prompt_ids):
        reason = {
            "tokens": "it adds or drops tokens of a prompt given as token ids",
            "text": "its tokenizer differs from the checkpoint's, or adds special tokens",
            "messages": "its chat template is another one, or it puts in a system turn or thinking tags of its own; start the "
            "server with the chat template of the checkpoint or of the recipe (prompt.chat_template)",
        }[way]
        raise UserError(
            f"{url} read {completion.prompt_tokens} prompt tokens for problem {request.problem}, the recipe's prompt has "
            f"{len(request.prompt_ids)}: {reason}"
        )


def refused(response: httpx.Response) -> Exception:
    """What an HTTP state means: try again, or stop."""
    said = f"HTTP {response.status_code}: {' '.join(response.text.split())[:EXCERPT]}"
    state = response.status_code
    if state in RETRIED or state >= 500:
        return ServerFailure(said, retry_after=_retry_after(response), blames_request=state not in LATER)
    if state in (401, 403):
        said += ". Set the environment variable OPENAI_API_KEY to a key that it takes"
    return UserError(f"{response.url} refuses the request: {said}")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds: the header holds them, or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _connection_failure(error: httpx.HTTPError) -> ServerFailure:
    refused_outright = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    return ServerFailure(f"{type(error).__name__}: {error or 'no reason given'}", blames_request=not refused_outright)


class _limit:
    """`async with _limit(seconds, reason)`: a ServerFailure with the reason when it takes longer; None: no limit."""

    def __init__(self, seconds: float | None, reason: str) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._reason = reason

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as late:
            raise ServerFailure(self._reason) from late
