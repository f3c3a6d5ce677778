"""A comparison of what servers compute with the checkpoint, before anything is scored.

Two looks: at the config of what is served, where it can be seen; and, always, at what the servers write after a few prompts longer
than the window, against what the hybrid class computes in fp32. That the prompts can show a mistake is measured: the same is
computed with those that engines make (every layer full, sinks ignored, other heads), and prompts are added until each is found.

Shapes: T prompt tokens, N new tokens, V vocabulary.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lt_train.dataset import prompts
from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.changed_config import changed
from lt_train.inference.requests import Request, Sampling
from lt_train.inference.servers.backend import OpenAIBackend
from lt_train.inference.servers.client import Message, ServerClient
from lt_train.inference.servers.completions_api import Completion
from lt_train.inference.servers.pool import ServerFailure, ServerSettings
from lt_train.inference.text import decode
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError, more
from lt_train.runtime.fingerprints import check_same

NEW_TOKENS = 24
BEYOND_WINDOW = 48  # tokens
PROMPTS = 3
MOST_PROMPTS = 12
ROUNDING = 2**-5
"""Largest error of a logit, over the largest logit: servers compute in bf16, whose step is 2^-8, and every layer rounds."""

MATHEMATICS = (
    "num_hidden_layers",
    "layer_types",
    "streaming_kv_heads",
    "sliding_window",
    "w_recent",
    "w_sink",
    "learned_sinks",
    "vocab_size",
    "rope_parameters",
)
"""Settings in config.json that decide what a query sees and where."""


@dataclass(frozen=True)
class Continuation:
    """The greedy continuation of a prompt. token_ids: N. logits_NV: before each of them, fp32."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits_NV: Tensor


@dataclass(frozen=True)
class ServerCheck:
    """The extent of a comparison.

    Attributes:
        tokens: new tokens of all prompts and servers that agree with the reference's. logprobs: those whose probability was
            compared too.
        undetectable: mistakes that no prompt shows, because this model writes the same with them.
    """

    prompts: int
    tokens: int
    logprobs: int
    undetectable: tuple[str, ...]


def check_server(
    settings: ServerSettings,
    reference: HybridForCausalLM,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    stop_ids: Sequence[int],
) -> ServerCheck:
    """
    Args:
        reference: the checkpoint in the hybrid class, fp32. folder: the checkpoint's, for its config.json.
        prompt: the recipe's; the requests of the check are made with it.

    Raises:
        UserError: a server runs another config, or generates other tokens; the message names the difference.
    """
    for url in settings.urls:
        asyncio.run(check_served_config(ServerClient(url, tokenizer, stop_ids, settings), folder))
    texts, wanted, undetectable = distinguishing_prompts(reference, tokenizer, prompt, stop_ids)
    requests = [Request(text, 0, 0, one.prompt_ids) for text, one in zip(texts, wanted, strict=True)]
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    tokens = logprobs = 0
    for url in settings.urls:
        only = replace(settings, urls=(url,))
        backend = OpenAIBackend(tokenizer, stop_ids, only, lambda request: chat_messages(prompt, request.problem))
        written = {request.problem: each for request, each, _ in backend.completions(requests, sampling, logprobs=True)}
        for text, one in zip(texts, wanted, strict=True):
            compare_config(url, folder, written[text].model)
            agreed, compared = compare_continuations(tokenizer, stop_ids, one, written[text], url)
            tokens, logprobs = tokens + agreed, logprobs + compared
    return ServerCheck(len(wanted), tokens, logprobs, undetectable)


def chat_messages(prompt: Prompt, question: str) -> list[Message]:
    """The recipe's prompt as a conversation, for servers that take nothing else."""
    return prompts.turns_of(prompt, [{"role": "user", "content": question}])


async def check_served_config(client: ServerClient, folder: Path) -> None:
    """Compare with the config of the folder that a server lists as its model, where that is a folder here."""
    try:
        models = await client.served_models()
    except (ServerFailure, UserError):
        return  # the requests that follow report the server's error
    finally:
        await client.close()
    for model in models:
        if len(models) == 1 or model.id == client.settings.model:
            for name in (model.root, model.id):
                compare_config(client.url, folder, name)


def compare_config(url: str, folder: Path, served: str | None) -> None:
    """
    Args:
        served: the name of what a server serves; compared where it is a local folder (`transformers serve` adds @main).
    """
    path = Path((served or "").removesuffix("@main")) / "config.json"
    try:
        if not served or not path.is_file():
            return
    except OSError:  # no name of a file
        return
    theirs, ours = _mathematics(path), _mathematics(folder / "config.json")
    check_same(theirs, ours, f"eval.servers: {url} serves {path.parent}, whose config.json differs", f"serve {folder}")


def _mathematics(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    values = {name: config.get(name) for name in MATHEMATICS}
    values |= {"w_sink": config.get("w_sink", 0), "learned_sinks": config.get("learned_sinks", False)}
    full = ["full_attention"] * config.get("num_hidden_layers", 0)
    values["layer_types"] = config.get("layer_types") or full
    if values["layer_types"] == full and values["streaming_kv_heads"] is None:
        values["sliding_window"] = values["w_sink"] = None  # nothing slides
    family = config.get("model_type", "").removeprefix("lt_hybrid_")
    return {"model_type": family, **values}


def distinguishing_prompts(
    reference: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, stop_ids: Sequence[int]
) -> tuple[list[str], list[Continuation], tuple[str, ...]]:
    """Seeded questions whose prompts are longer than the window, what the reference writes after them, and the mistakes that not
    even MOST_PROMPTS of them show."""
    generator = random.Random(0)
    length = min(reference.spec.window + BEYOND_WINDOW, context_length(reference.config.to_dict()) - NEW_TOKENS)
    mistakes = mistaken_specs(reference.spec, reference.config.kv_heads)
    texts: list[str] = []
    wanted: list[Continuation] = []
    while len(texts) < PROMPTS or (mistakes and len(texts) < MOST_PROMPTS):
        text = long_question(tokenizer, prompt, generator, length)
        prompt_ids = tuple(prompts.prompt_ids(tokenizer, prompt, {"question": text}))
        expected = continue_greedily(reference, prompt_ids, stop_ids)
        for name, spec in list(mistakes.items()):
            with computing(reference, spec):
                mistaken = continue_greedily(reference, prompt_ids, stop_ids, until_other_than=expected.token_ids)
            if first_difference(expected, mistaken.token_ids) is not None:
                del mistakes[name]
        texts.append(text)
        wanted.append(expected)
    return texts, wanted, tuple(mistakes)


def mistaken_specs(spec: HybridSpec, kv_heads: int) -> dict[str, HybridSpec]:
    """The specs that engines compute which do not support hybrids, or not their KV heads."""
    others = tuple((layer, tuple(set(range(kv_heads)) - set(heads))) for layer, heads in spec.split_layers)
    mistakes = {
        "every layer full": spec.all_full,
        "sinks ignored": replace(spec, w_sink=0, learned_sinks=False),
        "streaming KV heads ignored": replace(spec, split_layers=()),
        "the other KV heads of a layer stream": replace(spec, split_layers=others),
    }
    return {name: mistaken for name, mistaken in mistakes.items() if spec.streams and mistaken != spec}


def computing(model: HybridForCausalLM, spec: HybridSpec) -> AbstractContextManager[None]:
    """A context in which the model computes another spec with its weights."""
    named = spec.split_layers or spec.sliding_layers
    heads_L = [list(heads) for heads in spec.streaming_heads(model.config.kv_heads)] if named else None
    return changed(
        model.config,
        layer_types=spec.layer_types,
        streaming_kv_heads=heads_L,
        w_sink=spec.w_sink,
        learned_sinks=spec.learned_sinks,
    )


def long_question(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, generator: random.Random, wanted: int) -> str:
    """Numbers and words, which every tokenizer knows, until the prompt has `wanted` tokens."""
    words = ["plus", "minus", "the", "sum", "of", "is", "and", "then", "a", "b", "c", "x"]
    text = "What comes next:"
    while len(prompts.prompt_ids(tokenizer, prompt, {"question": text})) < wanted:
        text += "".join(f" {generator.choice([generator.randrange(100), generator.choice(words)])}" for _ in range(8))
    return text


@torch.inference_mode()
def continue_greedily(
    model: HybridForCausalLM, prompt_ids: tuple[int, ...], stop_ids: Sequence[int], until_other_than: Sequence[int] | None = None
) -> Continuation:
    """Ends at a stop token, and at the first token that is not the one of `until_other_than`."""
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    cache = HybridCache(model.spec)
    tokens: list[int] = []
    logits: list[Tensor] = []
    while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in stop_ids):
        out = model(ids_1T, **{CACHE_ARGUMENT: cache})
        logits.append(out.logits[0, -1].float().cpu())
        tokens.append(int(logits[-1].argmax()))
        if until_other_than is not None and tokens != list(until_other_than[: len(tokens)]):
            break
        ids_1T = torch.tensor([[tokens[-1]]], device=model.device)
    return Continuation(prompt_ids, tuple(tokens), torch.stack(logits))


def first_difference(expected: Continuation, token_ids: Sequence[int]) -> int | None:
    """The first step at which tokens differ from the reference's by more than rounding explains; None: there is none.

    Where two tokens are so close that rounding may choose, what follows is not compared.
    """
    step = agreeing_tokens(expected, token_ids)
    if step == min(len(expected.token_ids), len(token_ids)):
        return None
    gap = (expected.logits_NV[step, expected.token_ids[step]] - expected.logits_NV[step, token_ids[step]]).item()
    return step if gap > allowed_gap(expected) else None


def agreeing_tokens(expected: Continuation, token_ids: Sequence[int]) -> int:
    """How many tokens are the reference's before the first other one."""
    pairs = zip(expected.token_ids, token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def allowed_gap(expected: Continuation) -> float:
    """Each of two logits may be off by what rounding explains."""
    return 2 * ROUNDING * expected.logits_NV.abs().max().item()


def compare_continuations(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], expected: Continuation, completion: Completion, url: str
) -> tuple[int, int]:
    """How many tokens agree, and of how many the probabilities were compared.

    Raises:
        UserError: a token, or a probability, that rounding does not explain.
    """
    if not completion.token_ids:
        return compare_text(tokenizer, expected, completion, url), 0
    step = first_difference(expected, completion.token_ids)
    if step is not None:
        other = decode(tokenizer, completion.token_ids[step : step + 1])
        raise _other_mathematics(url, expected, step, _other_token(tokenizer, expected, step, other))
    agreed = agreeing_tokens(expected, completion.token_ids)
    compared = completion.logprobs[:agreed]
    mine_NV = expected.logits_NV.log_softmax(-1)
    for step, theirs in enumerate(compared):
        mine = mine_NV[step, expected.token_ids[step]].item()
        if abs(mine - theirs) > allowed_gap(expected):
            difference = f"has log-probability {theirs:.3f} there and {mine:.3f} in the hybrid class"
            raise _other_mathematics(url, expected, step, difference)
    return agreed, len(compared)


def compare_text(tokenizer: PreTrainedTokenizerBase, expected: Continuation, completion: Completion, url: str) -> int:
    """As `compare_continuations`, where a server sends only text. The second likeliest token is taken for the unknown other one."""
    shown = [_shown(tokenizer, expected.token_ids[:count]) for count in range(len(expected.token_ids) + 1)]
    text = _shown(tokenizer, tokenizer(completion.text, add_special_tokens=False)["input_ids"])
    if text == shown[-1]:
        return len(expected.token_ids)
    step = sum(1 for _ in takewhile(text.startswith, shown[1:]))
    if step < len(expected.token_ids):
        first, second = expected.logits_NV[step].topk(2).values.tolist()
        if first - second > allowed_gap(expected):
            theirs = text[len(shown[step]) :][:40]
            raise _other_mathematics(url, expected, step, _other_token(tokenizer, expected, step, theirs))
    return step


def _shown(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _other_token(tokenizer: PreTrainedTokenizerBase, expected: Continuation, step: int, theirs: str) -> str:
    mine = decode(tokenizer, expected.token_ids[step : step + 1])
    return f"is {theirs!r} there and {mine!r} in the hybrid class, which is no tie"


def _other_mathematics(url: str, expected: Continuation, step: int, difference: str) -> UserError:
    return UserError(
        f"eval.servers: {url} computes something else than the checkpoint: after a prompt of {len(expected.prompt_ids)} tokens, "
        f"new token {step} {difference}. Fix: let the server load this checkpoint, in an engine that knows its layer types and "
        "sinks: lt-train serve does, and vLLM by launch/serve-vllm.sh; or set eval.backend to hybrid (the built-in engine)"
        + more("computes-something-else-than-the-checkpoint-a-server-is-refused")
    )
