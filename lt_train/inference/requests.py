"""Requests to a model and its answers, the same for every backend."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
"""stop: a stop token or stop string ended the answer; length: it was truncated at max_new_tokens."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0: greedy; top_p, top_k and min_p have no effect then.

    Attributes:
        top_p: keep the fewest most likely tokens that together reach it (arXiv 1904.09751); 1: all.
        top_k: keep this number of most likely tokens; 0: all.
        min_p: keep tokens at least as likely as this fraction of the likeliest (arXiv 2407.01082); 0: all.
        repetition_penalty: logits of tokens seen before (prompt included) are divided by it where positive and multiplied where
            negative (arXiv 1909.05858); 1: off.
        stop: strings that end an answer; neither they nor what follows is part of it.
        thinking_budget: tokens after which reasoning that is still open is closed with `thinking_close`.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    thinking_budget: int | None = None
    thinking_close: str = ""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        seed: the sample's own (`sample_seed`).
        max_new_tokens: its own limit below the sampling's.
        logprobs: report the log-probability of each new token and of this number of the likeliest; None: none.
    """

    problem: str
    sample: int
    seed: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities, before temperature, filters and penalties.

    Attributes:
        chosen: of the token that was chosen. top: (token id, log-probability) of the likeliest tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        text: without the stop token or string at its end; special tokens are shown.
        tokens: number of new tokens, the stop token included.
        thinking_tokens: number of them until the reasoning was closed; None where it never was.
        seconds: the time of the model, divided among the requests that were in progress together.
    """

    request: Request
    text: str
    tokens: int
    thinking_tokens: int | None
    finish_reason: FinishReason
    seconds: float


Watch = Callable[[int], None]


class Backend(Protocol):
    """Whoever answers."""

    def answers(self, requests: Sequence[Request], sampling: Sampling, watch: Watch = lambda tokens: None) -> Iterator[Answer]:
        """Answer every request, each as soon as it is done, in any order.

        Args:
            watch: called with the number of tokens that are new since it was last called.
        """


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one sample: 64 bits that follow from the evaluation's seed, the problem and the number of the sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample}/{problem}".encode()).digest()[:8])
