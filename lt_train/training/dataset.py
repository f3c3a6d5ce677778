"""Training examples as rows of TRL's trainer: token ids, labels (-100 on tokens without loss), and packs of complete documents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
import numpy as np
from trl import pack_dataset

from lt_train.dataset.examples import Example, lengths, prompt_lengths, token_rows
from lt_train.runtime.errors import UserError


def training_dataset(examples: Sequence[Example], *, max_length: int, packing: bool) -> datasets.Dataset:
    """Rows of `input_ids` and `labels`; packed rows also have `seq_lengths`, the lengths of their documents in order.

    Packing is best-fit decreasing over complete documents: none is split or truncated. Rows have at most `max_length` tokens.

    Raises:
        UserError: there is no example, one is longer than `max_length`, or one has no answer token to train on.
    """
    check_examples(examples, max_length)
    rows = token_rows(examples)
    if not packing:
        return rows
    with _quiet_datasets():
        return pack_dataset(rows, seq_length=max_length, strategy="bfd")


def check_examples(examples: Sequence[Example], max_length: int) -> None:
    """Refuse samples that TRL would silently truncate, and samples without an answer token."""
    if not examples:
        raise UserError("data: no example is left to train on (see the counts above). Fix: raise data.max_length or use other data")
    tokens, prompts = lengths(examples), prompt_lengths(examples)
    if tokens.max() > max_length:
        longest = examples[int(tokens.argmax())]
        raise UserError(
            f"data.max_length: {max_length}: {(tokens > max_length).sum()} examples are longer "
            f"(the longest, {longest.where}, has {len(longest)} tokens). "
            "Fix: set data.overlong to drop or truncate, or raise data.max_length"
        )
    # A causal model predicts from the second token on, so a label on the first token has no loss.
    unlabelled = np.flatnonzero(tokens <= np.maximum(prompts, 1)).tolist()
    if unlabelled:
        raise UserError(
            f"data: {len(unlabelled)} of {len(examples)} examples have no answer token to train on "
            f"(the first: {examples[unlabelled[0]].where}). Fix: drop them or raise data.max_length"
        )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """While the block runs, the datasets library shows no progress bar of its own."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
