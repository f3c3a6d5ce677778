"""When an answer ends, and what of its tokens is text: stop tokens, stop strings, the end of the thought."""

from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lt_train.recipe.reasoning_tags import REASONING_ENDS
from lt_train.runtime.errors import UserError


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's eos and those that the checkpoint's generation config names (chat models often have two), ascending.

    Raises:
        UserError: neither names one.
    """
    own = model.generation_config.eos_token_id
    named = [] if own is None else [own] if isinstance(own, int) else list(own)
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_ids = tuple(sorted({*named, *of_tokenizer}))
    if not stop_ids:
        raise UserError(
            "neither the tokenizer nor the generation config of this model names an end-of-sequence token, so no answer would ever "
            "end: set eos_token in its tokenizer_config.json"
        )
    return stop_ids


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def thinking_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> int | None:
    """How many tokens it took until the thought was closed; None where it never was."""

    def closed(token_ids: Sequence[int]) -> bool:
        text = decode(tokenizer, token_ids)
        return any(end in text for end in REASONING_ENDS)

    if not closed(token_ids):
        return None
    return bisect_left(range(len(token_ids)), True, key=lambda count: closed(token_ids[:count]))


def cut_at_stop_string(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None where there is none."""
    found = [text.index(string) for string in stop if string in text]
    return text[: min(found)] if found else None
