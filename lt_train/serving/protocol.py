"""Requests of the OpenAI protocol, checked strictly: a field that would change the answer and is not supported is refused."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lt_train.inference.requests import Sampling
from lt_train.recipe.faults import did_you_mean
from lt_train.runtime.errors import shown

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "skip_special_tokens": (False,),
}
"""Fields that are not supported, and their values that change nothing; null changes nothing either."""

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""

COMPLETION_TOKENS = 16
"""Of an answer by /v1/completions where a request does not limit it: OpenAI's default."""

Count = Annotated[int, Field(ge=1)]
Chosen = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)]


class ApiError(Exception):
    """An error that a client gets, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class AnswerRequest(BaseModel, ABC):
    """The fields that both kinds of request have in common.

    Attributes:
        top_k, min_p, repetition_penalty, stop_token_ids, return_token_ids: beyond OpenAI's protocol, as vLLM has them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Chosen | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in NEUTRAL and value is not None and not any(_is(value, neutral) for neutral in NEUTRAL[name]):
                raise PydanticCustomError(
                    "unsupported",
                    "{name}: {value}: this server does not support it. Fix: leave it out",
                    {"name": name, "value": shown(value)},
                )
            if name not in cls.model_fields and name not in NEUTRAL and name not in IGNORED:
                hint = did_you_mean(name, cls.model_fields) or "; Fix: leave it out"
                raise PydanticCustomError("unknown", "{name}: unknown parameter{hint}", {"name": name, "hint": hint})
        return {name: value for name, value in values.items() if name in cls.model_fields and value is not None}

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """The new tokens that each answer may have; None: as many as there is room for."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to report beside each; None: no log-probabilities."""

    def sampling(self, defaults: Sampling, max_new_tokens: int) -> Sampling:
        """How tokens are chosen; what the request leaves open is as in `defaults`."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=given(self.temperature, defaults.temperature),
            top_p=given(self.top_p, defaults.top_p),
            max_new_tokens=max_new_tokens,
            top_k=max(given(self.top_k, defaults.top_k), 0),
            min_p=given(self.min_p, defaults.min_p),
            repetition_penalty=given(self.repetition_penalty, defaults.repetition_penalty),
            stop=tuple(dict.fromkeys(stop)),
        )


class CompletionRequest(AnswerRequest):
    """The body of /v1/completions. A prompt is text or token ids; several prompts are answered by as many choices each."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [each for each in self.prompt if isinstance(each, int)]
        return [ids] if len(ids) == len(self.prompt) else [each for each in self.prompt if not isinstance(each, int)]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn. Further fields, such as reasoning_content, are the chat template's to read."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def turn(self) -> dict[str, Any]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(AnswerRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def refused_body(faults: Sequence[Any]) -> ApiError:
    """The first fault that pydantic found in a body."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {fault['ctx']['error']}")
    if fault["type"] in ("unsupported", "unknown"):
        return ApiError(400, fault["msg"], param=fault["ctx"]["name"])
    place = ".".join(str(part) for part in fault["loc"][1:] if not _is_union_member(part)) or "the body"
    value = "missing" if fault["type"] == "missing" else f"{shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return ApiError(400, f"{place}: {value}", param=place.partition(".")[0] or None)


def _is_union_member(part: str | int) -> bool:
    """Pydantic names the member of a union that it tried, such as list[str], in the place of a fault."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float"))


def _is(value: object, neutral: object) -> bool:
    """Whether a value is the neutral one; false is no number here."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
