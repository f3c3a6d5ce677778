"""A tiny model, its tokenizer and requests for the engine."""

import re
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.requests import Answer, Request, Sampling, sample_seed

EOS, VOCABULARY = 1, 40
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=24)


def tiny_model(spec: HybridSpec, dtype: torch.dtype = torch.float32) -> HybridForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return build_hybrid(config, spec).to(dtype).eval()


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A letter for each token."""
    words = {"<pad>": 0, "<eos>": EOS, "</think>": 2} | {chr(ord("A") + i): i + 3 for i in range(VOCABULARY - 3)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def requests(lengths: list[int], samples: int = 1) -> list[Request]:
    return [
        Request(f"p{n}-{length}", sample, sample_seed(7, f"p{n}", sample), tuple(3 + (n * 5 + i * i) % 30 for i in range(length)))
        for n, length in enumerate(lengths)
        for sample in range(samples)
    ]


MANY = [1, 2, 3, 7, 8, 9, 15, 16, 17, 33]
"""Shorter and longer than w_sink, the window, and one to four pages."""


def answered(engine: Engine, requested: list[Request], sampling: Sampling) -> dict[tuple[str, int], Answer]:
    found = {(a.request.problem, a.request.sample): a for a in engine.answers(requested, sampling)}
    assert len(found) == len(requested)
    return found


def texts(found: dict[tuple[str, int], Answer]) -> dict[tuple[str, int], tuple[str, int, str]]:
    return {key: (answer.text, answer.tokens, answer.finish_reason) for key, answer in found.items()}


def written(engine: Engine, requested: list[Request], sampling: Sampling) -> dict[str, list[int]]:
    """The ids of each answer's tokens."""
    batch = engine.batch(
        engine.lay_out(len(requested), max(len(request.prompt_ids) for request in requested) + sampling.max_new_tokens)
    )
    for request in requested:
        batch.add(request, sampling)
    found: dict[str, list[int]] = {request.problem: [] for request in requested}
    while not batch.is_empty:
        for token in batch.step():
            found[token.sequence.request.problem].append(token.token_id)
    return found


@torch.inference_mode()
def likeliest(model: HybridForCausalLM, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[int]:
    """What recomputing the prompt with the tokens before it would choose in place of each, by one forward pass without a cache.

    An answer of which each token is the one chosen is the greedy one.
    """
    logits_1TV = model(torch.tensor([[*prompt_ids, *ids]]), use_cache=False).logits
    return logits_1TV[0, len(prompt_ids) - 1 : -1].argmax(-1).tolist()


def assert_greedy(
    answers: dict[tuple[str, int], tuple[str, int, str]],
    requested: list[Request],
    chosen: Callable[[Sequence[int], Sequence[int]], list[int]],
) -> None:
    """Answers to GREEDY of `letter_tokenizer` are those of recomputing each prompt alone, by `likeliest` or its like."""
    vocabulary = letter_tokenizer().get_vocab()
    for request in requested:
        text, tokens, reason = answers[request.problem, request.sample]
        ids = [vocabulary[symbol] for symbol in re.findall(r"</?\w+>|.", text)] + [EOS] * (reason == "stop")
        assert chosen(request.prompt_ids, ids) == ids, request.problem
        assert tokens == len(ids) and EOS not in ids[:-1]
        assert reason == ("stop" if ids[-1] == EOS else "length") and (ids[-1] == EOS or tokens == GREEDY.max_new_tokens)
