"""Requests to one server: probing what it takes, and one completion at a time. HTTP, retries and streams are left to openai."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from ssl import SSLContext
from typing import Any, TypeVar

import httpx2
from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpxClient,
    OpenAIError,
    RequestOptions,
    Timeout,
)
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from lt_train.inference.requests import Request, Sampling
from lt_train.inference.servers.completions_api import (
    NEUTRAL,
    Abilities,
    ApiDescription,
    Completion,
    ModelList,
    PromptFormat,
    ServedModel,
    request_body,
    unknown_settings,
)
from lt_train.inference.servers.pool import Health, ServerFailure, ServerSettings
from lt_train.inference.text import decode
from lt_train.runtime.errors import UserError

Message = Mapping[str, str]
MakeMessages = Callable[[Request], Sequence[Message]]
Reply = TypeVar("Reply", bound=BaseModel)

RETRIES = 2
"""Further tries of a request on the same server, by the openai package: after refused connections, rate limits and states of 500
and above, with waits of at most two minutes where the server sends Retry-After, else of seconds."""

OVERLOADED = {429, 502, 503, 504}
"""HTTP states that are no verdict on the request itself."""

TRANSIENT = {408, 409, 425, *OVERLOADED}
"""HTTP states after which another attempt may succeed, as after all from 500 on."""

CONNECT_SECONDS = 15.0
LOOK_UP: RequestOptions = {"max_retries": 0, "timeout": 60.0}
EXCERPT = 500  # characters of a server's own words
SHORTEST_KEY = 8  # characters; an answer may hold a shorter one, such as the placeholder EMPTY, by itself
ONE_TOKEN = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=1)

OTHER_PROMPT: Mapping[PromptFormat, str] = {
    "tokens": "it adds or drops tokens of a prompt given as token ids. Fix: use another server, such as vLLM",
    "text": "its tokenizer differs from the checkpoint's, or adds special tokens. Fix: serve the folder export/ itself",
    "messages": "its chat template is another one, or it adds a system turn or reasoning tags of its own. Fix: start it with the "
    "chat template of the checkpoint or of the recipe (prompt.chat_template)",
}
"""Why a server reads another number of prompt tokens, by the format of the prompt."""


@cache
def _trusted_certificates() -> SSLContext:
    """Read once for all servers: openai would read them for each, in 50 ms."""
    return httpx2.create_ssl_context()


@dataclass
class ServerClient:
    """One server, addressed by `url`.

    Attributes:
        abilities: what it takes; None before `probe`.
        reviving: held by the one lane that waits until the server is ready again.
    """

    url: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    settings: ServerSettings
    messages: MakeMessages | None = None
    abilities: Abilities | None = None
    health: Health = field(default_factory=Health)
    reviving: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        # Servers without keys take any; the waits for a reply are limited in `_attempt`.
        key, timeout = self.settings.api_key or "EMPTY", Timeout(None, connect=CONNECT_SECONDS)
        http = DefaultAsyncHttpxClient(verify=_trusted_certificates())
        self._openai = AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=RETRIES, timeout=timeout, http_client=http)

    async def close(self) -> None:
        await self._openai.close()

    async def probe(self, example: Request, sampling: Sampling) -> None:
        """Find out, with requests of one token, how the server takes prompts and which settings it knows.

        Raises:
            ServerFailure: it is not there, or breaks. UserError: it takes none of our prompts, or would sample by other settings.
        """
        async with self._attempt("it sent no first token"):
            description = await self._look_up(f"{self.url}/openapi.json", ApiDescription)
            is_transformers = description is not None and {"/load_model", "/reset", "/v1/completions"} <= description.paths.keys()
            model = self.settings.model
            if model is None and not is_transformers:  # that one lists what is in the hub cache, not what it serves
                model = await self._only_model()
            abilities = Abilities(await self._prompt_format(example, model), model, is_transformers_serve=is_transformers)
            if not is_transformers:
                known = [field for field in NEUTRAL if await self._knows(field, example, abilities)]
                abilities = replace(abilities, fields=frozenset(known))
        if unknown := " and ".join(unknown_settings(abilities, sampling)):
            raise UserError(
                f"eval.servers: {self.url} does not know {unknown}: its answers would be sampled by other settings than the "
                f"recipe's. Fix: leave {unknown} out of the evaluation, or use a server that knows them, such as vLLM"
            )
        self.abilities = abilities

    async def complete(self, request: Request, sampling: Sampling, *, logprobs: bool = False) -> Completion:
        """
        Raises:
            ServerFailure: another attempt may help. UserError: it would not.
        """
        assert self.abilities is not None
        prompt = self._prompt(self.abilities.prompt_format, request)
        body = request_body(self.abilities, prompt, sampling, request.seed, self.stop_ids, logprobs=logprobs)
        async with self._attempt("it took longer than the time limit for one answer (timeout)") as limit:
            completion = await self._send(self.abilities.path, body, limit)
            tokens = max(completion.completion_tokens or 0, len(completion.token_ids))
            if tokens > sampling.max_new_tokens + 1:  # some count a stop token on top
                raise ValueError(f"it has {tokens} tokens, more than max_new_tokens={sampling.max_new_tokens}")
            answer = completion.text + completion.reasoning
            if len(self.settings.api_key or "") >= SHORTEST_KEY and any(form in answer for form in self.settings.forms_of_key):
                raise ValueError("it holds the API key")
        self._check_prompt_tokens(self.abilities.prompt_format, request, completion)
        counted = completion.completion_tokens
        if completion.finish_reason == "length" and counted is not None and counted < sampling.max_new_tokens:
            raise UserError(
                f"eval.max_new_tokens: {sampling.max_new_tokens}: {self.url} truncated an answer at {counted} tokens: its context "
                "is too short. Fix: start it with a longer one (vLLM: --max-model-len), or lower max_new_tokens"
            )
        return completion

    async def served_models(self) -> list[ServedModel]:
        """What the server lists; empty where it lists nothing that can be read. Raises ServerFailure."""
        async with self._attempt("it did not list its models"):
            listed = await self._look_up("/models", ModelList)
        return [] if listed is None else listed.data

    def excerpt(self, text: str) -> str:
        """A server's own words in one line that prints, without the key, which some echo."""
        for form in self.settings.forms_of_key:
            text = text.replace(form, "***")
        printable = "".join(c if c.isprintable() else " " for c in text[: 10 * EXCERPT])
        return " ".join(printable.split())[:EXCERPT]

    async def _send(self, path: str, body: Mapping[str, Any], limit: asyncio.Timeout | None = None) -> Completion:
        """
        Args:
            limit: moved with every chunk, so that it expires after `stall` seconds without one. None: a probe, not retried.
        """
        completion = Completion()
        deadline = None if limit is None else limit.when()
        options: RequestOptions = {} if limit else {"max_retries": 0}
        stream = self._openai.post(
            path, body=dict(body), cast_to=object, options=options, stream=True, stream_cls=AsyncStream[object]
        )
        async with await stream as chunks:
            if "text/event-stream" not in chunks.response.headers.get("content-type", ""):  # a server that does not stream
                completion.add(json.loads(await chunks.response.aread()))
                return completion.finish(self.vocab_size)
            async for chunk in chunks:
                completion.add(chunk)
                if limit is not None and deadline is not None and completion.begun:
                    limit.reschedule(min(deadline, asyncio.get_running_loop().time() + self.settings.stall))
        return completion.finish(self.vocab_size)

    async def _look_up(self, path: str, kind: type[Reply]) -> Reply | None:
        """What the server has at an address; None where that cannot be read."""
        try:
            return kind.model_validate(await self._openai.get(path, cast_to=object, options=LOOK_UP))
        except APIStatusError as error:
            if error.status_code in TRANSIENT:
                raise
        except (ValueError, RecursionError):
            pass
        return None

    @asynccontextmanager
    async def _attempt(self, overdue: str) -> AsyncIterator[asyncio.Timeout]:
        """Turn what the openai package raises into a ServerFailure, or a UserError where another attempt cannot help.

        Args:
            overdue: the reason when it takes longer than `timeout`.
        """
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        try:
            async with asyncio.timeout_at(deadline) as limit:
                yield limit
        except TimeoutError as error:
            stalled = f"it sent nothing more for {self.settings.stall:g} s in the middle of an answer (stall)"
            raise ServerFailure(stalled if (limit.when() or deadline) < deadline else overdue) from error
        except APIStatusError as error:
            raise self._refusal(error) from error
        except (APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ or error
            refused = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise ServerFailure(self.excerpt(f"{type(cause).__name__}: {cause}"), blames_request=not refused) from error
        except (OpenAIError, ValueError, RecursionError) as error:
            raise ServerFailure(self.excerpt(f"its reply is unusable: {type(error).__name__}: {error}")) from error

    def _refusal(self, error: APIStatusError) -> ServerFailure | UserError:
        status = error.status_code
        reply = f"HTTP {status}: {self.excerpt(error.response.text)}"
        if status in TRANSIENT or status >= 500:
            return ServerFailure(reply, blames_request=status not in OVERLOADED)
        fix = "set the environment variable OPENAI_API_KEY to a key that it takes" if status in (401, 403) else "see its log"
        return UserError(f"eval.servers: {self.url}: it refuses the request: {reply}. Fix: {fix}")

    def _prompt(self, prompt_format: PromptFormat, request: Request) -> Any:
        if prompt_format == "tokens":
            return list(request.prompt_ids)
        if prompt_format == "text":
            text = text_of_prompt(self.tokenizer, request.prompt_ids)
            if text is None:
                raise UserError(
                    f"eval.servers: {self.url} takes no token ids, and the prompt of problem {request.problem}, written as text, "
                    "is tokenized to other tokens. Fix: use a server that takes token ids, such as vLLM"
                )
            return text
        assert self.messages is not None
        return [dict(message) for message in self.messages(request)]

    def _check_prompt_tokens(self, prompt_format: PromptFormat, request: Request, completion: Completion) -> None:
        """
        Raises:
            UserError: the server read another number of prompt tokens than the prompt has, or reports none where it tokenizes.
        """
        if completion.prompt_tokens is None and prompt_format != "tokens":
            raise UserError(
                f"eval.servers: {self.url} does not report usage.prompt_tokens, so whether it reads the prompt of the training is "
                "unknown. Fix: use a server that takes prompts as token ids, such as vLLM"
            )
        if completion.prompt_tokens not in (None, len(request.prompt_ids)):
            raise UserError(
                f"eval.servers: {self.url} read {completion.prompt_tokens} prompt tokens for problem {request.problem}, the "
                f"recipe's prompt has {len(request.prompt_ids)}: {OTHER_PROMPT[prompt_format]}"
            )

    # Probing

    async def _only_model(self) -> str | None:
        """The one model that the server lists; None where it lists none."""
        names = [model.id for model in await self.served_models()]
        if len(names) > 1:
            listed = self.excerpt(", ".join(names[:8]))
            raise UserError(f"eval.served_model: missing, and {self.url} serves several: {listed}. Fix: set it to one of them")
        return names[0] if names else None

    async def _prompt_format(self, example: Request, model: str | None) -> PromptFormat:
        formats: list[PromptFormat] = ["tokens"]
        if text_of_prompt(self.tokenizer, example.prompt_ids) is not None:
            formats.append("text")
        if self.messages is not None:
            formats.append("messages")
        refusals = []
        for prompt_format in formats:
            try:
                await self._probe(example, Abilities(prompt_format, model))
                return prompt_format
            except UserError as refusal:
                refusals.append(f"  {prompt_format}: {refusal}")
        fix = "Fix: check that it is an OpenAI-compatible server, and that eval.served_model is a model that it serves"
        raise UserError("\n".join([f"eval.servers: {self.url} takes none of our prompts:", *refusals, fix]))

    async def _knows(self, field: str, example: Request, abilities: Abilities) -> bool:
        """Whether it takes a valid value and refuses an invalid one; a server that ignores the field takes both."""
        try:
            await self._probe(example, abilities, {field: {"not": "a value"}})
            return False
        except ServerFailure as failure:
            if not failure.blames_request:
                raise
        except (UserError, ValueError):
            pass
        try:
            await self._probe(example, abilities, {field: NEUTRAL[field]})
            return True
        except UserError:
            return False

    async def _probe(self, example: Request, abilities: Abilities, more: Mapping[str, object] | None = None) -> None:
        body = request_body(abilities, self._prompt(abilities.prompt_format, example), ONE_TOKEN, 0, ())
        try:
            completion = await self._send(abilities.path, body | dict(more or {}))
        except APIStatusError as error:
            raise self._refusal(error) from error
        self._check_prompt_tokens(abilities.prompt_format, example, completion)


def text_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str | None:
    """A text that a server, tokenizing it as `tokenizer(text)` does, turns into exactly these tokens; None if there is none.

    A tokenizer that writes a beginning-of-sequence token by itself must not get that of the chat template as well.
    """
    for ids in (prompt_ids, prompt_ids[1:]):
        text = decode(tokenizer, ids)
        if tuple(tokenizer(text)["input_ids"]) == tuple(prompt_ids):
            return text
    return None
