"""Training examples as the rows TRL's trainer takes: token ids, labels (-100 where no loss is), and packs of whole documents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
import numpy as np
from trl import pack_dataset

from lt_train.dataset.examples import Example, lengths, prompt_lengths, token_rows
from lt_train.runtime.errors import UserError


def training_dataset(examples: Sequence[Example], *, max_length: int, packing: bool) -> datasets.Dataset:
    """Rows of `input_ids` and `labels`; packed rows also have `seq_lengths`, the lengths of their documents in order.

    Packing is best-fit decreasing over whole documents: none is split and none is cut. Rows hold at most `max_length` tokens.

    Raises:
        UserError: there is no example, one is longer than `max_length`, or one has no token to learn from.
    """
    check_examples(examples, max_length)
    rows = token_rows(examples)
    if not packing:
        return rows
    with _quiet_datasets():
        return pack_dataset(rows, seq_length=max_length, strategy="bfd")


def check_examples(examples: Sequence[Example], max_length: int) -> None:
    """Stop before TRL would cut a sample in silence or train on one that teaches nothing."""
    if not examples:
        raise UserError("data: no example is left to train on. See the counts above: raise data.max_length or give other data")
    whole, prompts = lengths(examples), prompt_lengths(examples)
    if whole.max() > max_length:
        longest = examples[int(whole.argmax())]
        raise UserError(
            f"data.max_length: {(whole > max_length).sum()} examples are longer than {max_length} tokens "
            f"(the longest, {longest.where}, has {len(longest)}). Set data.overlong to drop or truncate, or raise data.max_length"
        )
    # A causal model predicts from the second token on, so a label on the first teaches nothing.
    unlabelled = np.flatnonzero(whole <= np.maximum(prompts, 1)).tolist()
    if unlabelled:
        raise UserError(
            f"data: {len(unlabelled)} of {len(examples)} examples have no answer token to learn from "
            f"(the first: {examples[unlabelled[0]].where}). Drop them or raise data.max_length"
        )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No bar of the datasets library beside our own progress."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
