"""Replies of the OpenAI protocol: one choice as its tokens come, and the JSON of chunks and of complete replies."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lt_train.inference.continuous_batch import NewToken
from lt_train.inference.requests import Answer, Logprobs
from lt_train.inference.streamed_text import StreamedText
from lt_train.inference.text import decode

Kind = Literal["completion", "chat"]


@dataclass
class Choice:
    """One answer of a reply.

    Attributes:
        pending: its tokens that no chunk has held yet.
    """

    kind: Kind
    index: int
    tokenizer: PreTrainedTokenizerBase
    streamed: StreamedText
    with_ids: bool
    pending: list[NewToken] = field(default_factory=list)
    answer: Answer | None = None
    _shown: int = 0
    """Characters of the tokens of which log-probabilities were reported."""

    def add(self, token: NewToken) -> str:
        """The text that the token makes final."""
        self.pending.append(token)
        self.answer = token.answer
        piece = self.streamed.add(token.token_id)
        return piece if token.answer is None else piece + self.streamed.finish(token.answer.text)

    def chunk(self, text: str) -> dict[str, Any]:
        content = {"text": text} if self.kind == "completion" else {"delta": {"content": text}}
        return self._with_tokens(content)

    def complete(self) -> dict[str, Any]:
        text = self.streamed.sent
        content = {"text": text} if self.kind == "completion" else {"message": {"role": "assistant", "content": text}}
        return self._with_tokens(content)

    def _with_tokens(self, content: Mapping[str, Any]) -> dict[str, Any]:
        tokens, self.pending = self.pending, []
        reason = None if self.answer is None else self.answer.finish_reason
        choice = {"index": self.index, **content, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return choice | ({"token_ids": [token.token_id for token in tokens]} if self.with_ids else {})

    def _logprobs(self, tokens: Sequence[NewToken]) -> dict[str, Any] | None:
        known = [(self._text(token.token_id), token.logprobs) for token in tokens if token.logprobs is not None]
        if not known:
            return None
        if self.kind == "chat":
            return {"content": [self._entry(text, logprobs) for text, logprobs in known], "refusal": None}
        offsets = []
        for text, _ in known:
            offsets.append(self._shown)
            self._shown += len(text)
        return {
            "tokens": [text for text, _ in known],
            "token_logprobs": [logprobs.chosen for _, logprobs in known],
            "top_logprobs": [{self._text(token): value for token, value in logprobs.top} for _, logprobs in known],
            "text_offset": offsets,
        }

    def _entry(self, text: str, logprobs: Logprobs) -> dict[str, Any]:
        top = [_token(self._text(token_id), value) for token_id, value in logprobs.top]
        return _token(text, logprobs.chosen) | {"top_logprobs": top}

    def _text(self, token_id: int) -> str:
        return decode(self.tokenizer, [token_id])


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class Reply:
    """The fields that all chunks of a reply, or the complete one, have in common."""

    def __init__(self, kind: Kind, model: str, prompt_tokens: int) -> None:
        self.kind = kind
        self.prompt_tokens = prompt_tokens
        self._common = {
            "id": f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def complete(self, choices: Sequence[Choice]) -> dict[str, Any]:
        name = "text_completion" if self.kind == "completion" else "chat.completion"
        return {**self._common, "object": name, "choices": [choice.complete() for choice in choices], "usage": self.usage(choices)}

    def chunk(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        return {**self._common, "object": name, "choices": list(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Tokens of prompts and answers; those of the reasoning where it was closed."""
        answers = [choice.answer for choice in choices if choice.answer is not None]
        completion = sum(answer.tokens for answer in answers)
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }
        thinking = [answer.thinking_tokens for answer in answers if answer.thinking_tokens is not None]
        return usage | ({"completion_tokens_details": {"reasoning_tokens": sum(thinking)}} if thinking else {})
