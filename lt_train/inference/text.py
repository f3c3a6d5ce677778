"""When an answer ends, and what of its tokens is text: stop tokens, stop strings, the end of the reasoning."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lt_train.inference.generation_config import listed
from lt_train.recipe.reasoning_tags import REASONING_ENDS
from lt_train.runtime.errors import UserError

GENERATION_PROMPT_TOKENS = 64
"""More than the end of any prompt that closes the reasoning takes."""


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's eos and those that the checkpoint's generation config names (chat models often have two), ascending.

    Raises:
        UserError: neither names one, or one is no token of the tokenizer.
    """
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_ids = tuple(sorted({*listed(model.generation_config.eos_token_id), *of_tokenizer}))
    if not stop_ids:
        raise UserError(
            "model.base: neither the tokenizer nor the generation config names an end-of-sequence token, so no answer ends. Fix: "
            "set eos_token in its tokenizer_config.json, or prompt.stop_token"
        )
    check_stop_tokens(stop_ids, tokenizer, model.config._name_or_path)
    return stop_ids


def check_stop_tokens(stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """
    Raises:
        UserError: one of them is no token of the tokenizer.
    """
    unknown = sorted(set(stop_ids) - set(tokenizer.get_vocab().values()))
    if unknown:
        raise UserError(
            f"model.base: {base}: eos_token_id {', '.join(map(str, unknown))} of its generation_config.json is no token of its "
            "tokenizer. Fix: correct it there, or download the base again"
        )


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def reasoning_ends(thinking_close: str) -> tuple[str, ...]:
    """What closes the reasoning of an answer: the usual tags, and the last line of the recipe's `thinking_close`."""
    own = thinking_close.strip().rpartition("\n")[2]
    return (*REASONING_ENDS, own) if own else REASONING_ENDS


def thinking_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], thinking_close: str = "") -> int | None:
    """Number of tokens until the reasoning was closed; None where it never was."""
    ends = reasoning_ends(thinking_close)

    def closed(token_ids: Sequence[int]) -> bool:
        text = decode(tokenizer, token_ids)
        return any(end in text for end in ends)

    if not closed(token_ids):
        return None
    return bisect_left(range(len(token_ids)), True, key=lambda count: closed(token_ids[:count]))


def closed_by_prompt(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], thinking_close: str) -> bool:
    """Whether a prompt ends with what closes the reasoning, as Qwen3's does without thinking."""
    return decode(tokenizer, prompt_ids[-GENERATION_PROMPT_TOKENS:]).rstrip().endswith(reasoning_ends(thinking_close))


def cut_at_stop_string(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None where there is none."""
    found = [text.index(string) for string in stop if string in text]
    return text[: min(found)] if found else None


def unfinished(text: str, strings: Iterable[str]) -> int:
    """Characters at the end of a text with which one of the strings begins that may still be completed."""
    longest = max((min(len(string) - 1, len(text)) for string in strings), default=0)
    return next((n for n in range(longest, 0, -1) if any(string.startswith(text[-n:]) for string in strings if len(string) > n)), 0)
