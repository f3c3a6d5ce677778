"""The OpenAI completions protocol: the body of a request, and what a reply holds, streamed or complete."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from lt_train.inference.requests import Sampling

PromptFormat = Literal["tokens", "text", "messages"]
"""How a server takes prompts: /v1/completions with token ids, or with text that it tokenizes to the same ids, or
/v1/chat/completions with messages that its template turns into the same ids."""

NEUTRAL: Mapping[str, object] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "stop_token_ids": [],
}
"""Fields outside the OpenAI standard, with the values that change nothing. They are always sent where a server knows them, for
servers fill what a request leaves open from the checkpoint's generation_config.json."""


@dataclass(frozen=True)
class Abilities:
    """The settings and forms of prompt that a server accepts.

    Attributes:
        model: the name to send; None: none is sent.
        fields: those of NEUTRAL that it knows.
        is_transformers_serve: it takes all sampling settings as one JSON text, and works on one request at a time, because a
            seed holds there for whatever is being generated when it comes.
    """

    prompt_format: PromptFormat
    model: str | None
    fields: frozenset[str] = frozenset()
    is_transformers_serve: bool = False

    @property
    def path(self) -> str:
        return "/chat/completions" if self.prompt_format == "messages" else "/completions"


def request_body(
    abilities: Abilities,
    prompt: Sequence[int] | str | Sequence[Mapping[str, str]],
    sampling: Sampling,
    seed: int,
    stop_ids: Sequence[int],
    *,
    logprobs: bool = False,
) -> dict[str, Any]:
    """The JSON of a request. Every setting is sent, not only those that differ from a default: the server's may be others."""
    body: dict[str, Any] = {
        "messages" if abilities.prompt_format == "messages" else "prompt": prompt,
        "max_tokens": sampling.max_new_tokens,
        "stream": True,
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
    }
    if abilities.model is not None:
        body["model"] = abilities.model
    if not sampling.greedy:
        body["seed"] = seed >> 33  # 31 bits: what every server takes
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if abilities.is_transformers_serve:
        return body | {"generation_config": json.dumps(_generation_config(sampling, stop_ids))}
    body |= {name: value for name, value in _beyond_the_standard(sampling, stop_ids).items() if name in abilities.fields}
    body["stream_options"] = {"include_usage": True}
    if logprobs and abilities.prompt_format != "messages":
        body["logprobs"] = 1
    return body


def unknown_settings(abilities: Abilities, sampling: Sampling) -> list[str]:
    """Sampling settings that matter and that the server does not know."""
    fields = {} if abilities.is_transformers_serve else _beyond_the_standard(sampling, ())
    return [name for name, value in fields.items() if value != NEUTRAL[name] and name not in abilities.fields]


def _beyond_the_standard(sampling: Sampling, stop_ids: Sequence[int]) -> dict[str, object]:
    """The fields of NEUTRAL with the values of this sampling."""
    fields = {**NEUTRAL, "repetition_penalty": sampling.repetition_penalty, "stop_token_ids": list(stop_ids)}
    return fields if sampling.greedy else fields | {"top_k": sampling.top_k or -1, "min_p": sampling.min_p}


def _generation_config(sampling: Sampling, stop_ids: Sequence[int]) -> dict[str, object]:
    """transformers' GenerationConfig; what it leaves open is filled from the checkpoint, so nothing that matters is left open."""
    names = ["repetition_penalty", *([] if sampling.greedy else ["temperature", "top_p", "top_k", "min_p"])]
    chosen = {name: getattr(sampling, name) for name in names}
    return {"do_sample": not sampling.greedy, "num_beams": 1, "eos_token_id": list(stop_ids), **chosen}


# Replies

Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Reply(BaseModel):
    """Strict, because what a server sends decides scores; fields that are not read are free."""

    model_config = ConfigDict(strict=True)


class _Message(_Reply):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Logprobs(_Reply):
    token_logprobs: list[FiniteFloat] | None = None


class _Choice(_Reply):
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    token_ids: list[Count] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(_Reply):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class Chunk(_Reply):
    """A piece of a streamed reply, or a complete one."""

    choices: list[_Choice] = Field(max_length=1)
    usage: _Usage | None = None
    model: str | None = None


class ServedModel(_Reply):
    id: str
    root: str | None = None


class ModelList(_Reply):
    """The reply of /v1/models."""

    data: list[ServedModel]


class ApiDescription(_Reply):
    """The reply of /openapi.json."""

    paths: dict[str, object]


@dataclass
class Completion:
    """A server's reply to one request, joined from its chunks.

    Attributes:
        reasoning: where the server splits it off the text.
        token_ids: of the new tokens, where the server sends them. logprobs: natural, of the same tokens, where requested and sent.
        usage: the server's counts of tokens, where sent.
        model: the name of what it served.
    """

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str | None = None
    begun: bool = False

    def add(self, reply: object) -> None:
        """Raises ValueError: this is no chunk of a completion."""
        if isinstance(reply, dict) and reply.get("error"):
            raise ValueError(f"it reports an error: {reply['error']}")
        chunk = Chunk.model_validate(reply)
        self.model = chunk.model or self.model
        if chunk.usage is not None:
            self.prompt_tokens, self.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            message = choice.delta or choice.message or _Message(content=choice.text)
            self.begun = True
            self.text += message.content or ""
            self.reasoning += message.reasoning_content or message.reasoning or ""
            self.token_ids += choice.token_ids or ()
            self.logprobs += (choice.logprobs and choice.logprobs.token_logprobs) or ()
            self.finish_reason = choice.finish_reason or self.finish_reason

    def finish(self, vocab_size: int) -> "Completion":
        """Raises ValueError: it is truncated, or holds other tokens than the `vocab_size` that there are."""
        if not self.begun:
            raise ValueError("it holds no choices")
        if self.finish_reason not in ("stop", "length"):
            raise ValueError(f"it ends with finish_reason {self.finish_reason!r}")
        if max(self.token_ids, default=0) >= vocab_size:
            raise ValueError(f"it holds token {max(self.token_ids)}, and there are {vocab_size}")
        if self.completion_tokens not in (None, len(self.token_ids)):
            self.token_ids = []  # not of all tokens
        f"{self.text}{self.reasoning}".encode()  # lone surrogates, which JSON can hold and no file, are a ValueError
        return self
