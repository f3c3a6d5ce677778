"""The OpenAI completions protocol: what is sent for a request, and what is read from the answer, streamed or whole."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lt_train.inference.requests import Sampling
from lt_train.inference.servers.pool import ServerFailure

PromptWay = Literal["tokens", "text", "messages"]
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
    """What a server takes.

    Attributes:
        model: the name to ask for; None: none is sent.
        fields: those of NEUTRAL that it knows.
        generation_config: takes all sampling settings as one JSON text (`transformers serve`).
    """

    way: PromptWay
    model: str | None
    fields: frozenset[str]
    generation_config: bool

    @property
    def one_at_a_time(self) -> bool:
        """`transformers serve` works so, and a seed holds there for whatever is being generated when it comes."""
        return self.generation_config

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.way == "messages" else "/v1/completions"


@dataclass(frozen=True)
class Completion:
    """What a server sent for one request.

    Attributes:
        reasoning: the thought, where the server splits it off the text.
        token_ids: of the new tokens, where the server tells them. logprobs: natural, of the same tokens, where asked and told.
        prompt_tokens, completion_tokens: the server's count, where told.
        model: what it says that it served.
    """

    text: str
    reasoning: str | None
    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str | None


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
        "messages" if abilities.way == "messages" else "prompt": prompt,
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
    if abilities.generation_config:
        return body | {"generation_config": json.dumps(_generation_config(sampling, stop_ids))}
    chosen = dict(NEUTRAL) | {"repetition_penalty": sampling.repetition_penalty, "stop_token_ids": list(stop_ids)}
    if not sampling.greedy:
        chosen |= {"top_k": sampling.top_k or -1, "min_p": sampling.min_p}
    body |= {name: value for name, value in chosen.items() if name in abilities.fields}
    body["stream_options"] = {"include_usage": True}
    if logprobs and abilities.way != "messages":
        body["logprobs"] = 1
    return body


def unknown_settings(abilities: Abilities, sampling: Sampling) -> list[str]:
    """Sampling settings that matter and that the server does not know."""
    if abilities.generation_config:
        return []
    wanted = {"repetition_penalty": sampling.repetition_penalty != 1.0}
    if not sampling.greedy:
        wanted |= {"top_k": sampling.top_k != 0, "min_p": sampling.min_p != 0.0}
    return [name for name, matters in wanted.items() if matters and name not in abilities.fields]


def _generation_config(sampling: Sampling, stop_ids: Sequence[int]) -> dict[str, object]:
    """transformers' GenerationConfig; what it leaves open is filled from the checkpoint, so nothing that matters is left open."""
    config: dict[str, object] = {
        "do_sample": not sampling.greedy,
        "num_beams": 1,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": list(stop_ids),
    }
    if not sampling.greedy:
        config |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    return config


@dataclass
class CompletionReader:
    """Puts a completion together from the chunks of a stream, or from one whole answer.

    Raises ServerFailure for what is no such chunk.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    choices: int = 0

    def add_line(self, line: str) -> None:
        """One line of a server-sent event stream."""
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data != "[DONE]":
                self.add(data)

    def add(self, text: str) -> None:
        """One JSON object: a chunk, or a whole answer."""
        try:
            chunk = json.loads(text)
        except ValueError as error:
            raise ServerFailure(f"it sent no JSON ({error}): {text[:200]!r}") from error
        if not isinstance(chunk, dict):
            raise ServerFailure(f"it sent no object: {text[:200]!r}")
        if chunk.get("error"):
            raise ServerFailure(f"it sent an error: {json.dumps(chunk['error'])[:500]}")
        try:
            self._add_chunk(chunk)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ServerFailure(f"it sent something else than a completion ({error!r}): {text[:200]!r}") from error

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        self.model = chunk.get("model") or self.model
        counts = {name: (chunk.get("usage") or {}).get(name) for name in ("prompt_tokens", "completion_tokens")}
        self.usage |= {name: int(count) for name, count in counts.items() if count is not None}
        for choice in chunk["choices"]:
            self.choices += 1
            part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            if not isinstance(part.get("content") or "", str):
                raise ValueError("the content is no text")
            self.text.append(part.get("content") or "")
            self.reasoning.append(part.get("reasoning_content") or part.get("reasoning") or "")
            self.token_ids.extend(map(int, choice.get("token_ids") or ()))
            self.logprobs.extend(map(float, (choice.get("logprobs") or {}).get("token_logprobs") or ()))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def completion(self) -> Completion:
        """
        Raises:
            ServerFailure: the answer has no choice, or ends without a finish_reason.
        """
        if not self.choices:
            raise ServerFailure("its answer holds no choices")
        if self.finish_reason is None:
            raise ServerFailure("its answer was cut off: it ends without a finish_reason")
        counted = self.usage.get("completion_tokens")
        whole = self.token_ids and (counted is None or counted == len(self.token_ids))
        return Completion(
            text="".join(self.text),
            reasoning="".join(self.reasoning) or None,
            token_ids=tuple(self.token_ids) if whole else None,
            logprobs=tuple(self.logprobs) or None,
            finish_reason=self.finish_reason,
            prompt_tokens=self.usage.get("prompt_tokens"),
            completion_tokens=counted,
            model=self.model,
        )
