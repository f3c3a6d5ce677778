"""Samples to score layers on, from plain text instead of traces: every token after the first counts as one of an answer."""

import random
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.examples import Example
from lt_train.runtime.text_files import read_texts

SOURCE = "hybrid.calibration.source"


def text_examples(source: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, max_length: int, seed: int) -> list[Example]:
    """At most `samples` samples of at most `max_length` tokens, drawn by `seed`.

    Args:
        source: a .txt file or a folder of them.

    Raises:
        UserError: there is no text (see `read_texts`).
    """
    found = [each for file, text in read_texts(source, SOURCE).items() for each in _samples(file, text, tokenizer, max_length)]
    random.Random(f"calibration {seed}").shuffle(found)
    return found[:samples]


def _samples(file: Path, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    """All of the text, or as many samples of `max_length` tokens as it has. Each begins as a sequence of its own does."""
    first = tokenizer("")["input_ids"]  # a bos token, where the tokenizer puts one in front
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = max_length - len(first)
    for start in range(0, max(len(ids) - room, 0) + 1, room):
        part = (*first, *ids[start : start + room])
        yield Example(f"{file.name}:{start}", str(file), part[:1], part[1:])
