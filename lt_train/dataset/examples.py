"""Examples to train on: the token ids of a prompt, and of the answer that is trained on.

Those of a data set are in an Arrow file that is memory-mapped: each is made when it is read, and every process of a machine
reads the same pages.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np

from lt_train.recipe.schema import Calibration
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_json, sha256_of

if TYPE_CHECKING:
    import datasets

IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Example:
    """One answer and its prompt.

    Attributes:
        id: follows from the question and the answer; the same in every order of the data.
        where: file and line it was read from.
        prompt_ids: ends with the generation prompt.
        answer_ids: ends with the eos, unless truncated.
        question_id: follows from the last question alone.
    """

    id: str
    where: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated: bool = False
    question_id: str = ""

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt_ids) + list(self.answer_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class StoredExamples(Sequence[Example]):
    """Examples in an Arrow table.

    Args:
        table: with the columns of `store.FEATURES`.
        fingerprint: `examples_fingerprint` of these, where it is known.
    """

    def __init__(self, table: "datasets.Dataset", fingerprint: str | None = None) -> None:
        self.table = table
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "StoredExamples": ...
    def __getitem__(self, at: int | slice) -> "Example | StoredExamples":
        if isinstance(at, slice):
            return self.select(range(*at.indices(len(self))))
        row = self.table[at]
        prompt = row["prompt_length"]
        return Example(
            id=row["id"],
            where=row["where"],
            prompt_ids=tuple(row["input_ids"][:prompt]),
            answer_ids=tuple(row["input_ids"][prompt:]),
            truncated=row["truncated"],
            question_id=row["question_id"],
        )

    def select(self, indices: Iterable[int]) -> "StoredExamples":
        """These examples, in this order; nothing is copied."""
        return StoredExamples(self.table.select(indices))

    def column(self, name: str) -> np.ndarray:
        """One number for each example."""
        return np.asarray(self.table.with_format("numpy", columns=[name])[:][name])


@dataclass(frozen=True)
class ExampleSet:
    """Examples to train on, and examples set aside.

    Attributes:
        counts: what became of the rows.
        format: which fields of the rows were read, in words.
        warnings: what a user should know about the data before training on them.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    counts: dict[str, int]
    format: str = ""
    warnings: tuple[str, ...] = ()


def lengths(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, prompt and answer."""
    if isinstance(examples, StoredExamples):
        return examples.column("length")
    return np.array([len(example) for example in examples], dtype=np.int32)


def prompt_lengths(examples: Sequence[Example]) -> np.ndarray:
    if isinstance(examples, StoredExamples):
        return examples.column("prompt_length")
    return np.array([len(example.prompt_ids) for example in examples], dtype=np.int32)


def select(examples: Sequence[Example], indices: Iterable[int]) -> Sequence[Example]:
    if isinstance(examples, StoredExamples):
        return examples.select(indices)
    return [examples[at] for at in indices]


def longest_first(examples: Sequence[Example]) -> Sequence[Example]:
    """Examples of equal length stay in their order."""
    return select(examples, np.argsort(-lengths(examples), kind="stable").tolist())


def token_rows(examples: Sequence[Example]) -> "datasets.Dataset":
    """The examples as rows of `input_ids` and `labels`; stored ones stay where they are."""
    if isinstance(examples, StoredExamples):
        return examples.table.select_columns(["input_ids", "labels"])
    import datasets  # seconds, which evaluations of answers do without

    return datasets.Dataset.from_dict(
        {"input_ids": [example.input_ids for example in examples], "labels": [example.labels for example in examples]}
    )


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over every token and label in order: equal if and only if training sees the same data."""
    if isinstance(examples, StoredExamples) and examples.fingerprint is not None:
        return examples.fingerprint
    rows = token_rows(examples)
    return sha256_of(f"({json.dumps(row['input_ids'])}, {json.dumps(row['labels'])})".encode() for row in rows)


def samples_fingerprint(examples: Sequence[Example]) -> str:
    """16 hex digits that follow from the ids and tokens of calibration or held-out samples, in order."""
    return hash_of_json([[example.id, example.prompt_ids, example.answer_ids] for example in examples])


def calibration_examples(examples: ExampleSet, calibration: Calibration, seed: int) -> list[Example]:
    """The samples that layers are scored on: the first of a shuffle of the training part, truncated to calibration.max_length.

    A sample whose prompt alone fills calibration.max_length has no answer token to score and is passed over.
    """
    order = list(range(len(examples.train)))
    random.Random(f"calibration {seed}").shuffle(order)
    longest = calibration.max_length
    if longest is None:
        return [examples.train[at] for at in order[: calibration.samples]]
    prompts = prompt_lengths(examples.train)
    fitting = [at for at in order if prompts[at] < longest]
    if not fitting:
        raise UserError(f"hybrid.calibration.max_length: every prompt has {longest} tokens or more; raise it")
    return [truncated(examples.train[at], longest) for at in fitting[: calibration.samples]]


def truncated(example: Example, max_length: int) -> Example:
    """The example without its end, eos included: a truncated trace must not teach to stop in the middle."""
    if len(example) <= max_length:
        return example
    return replace(example, answer_ids=example.answer_ids[: max_length - len(example.prompt_ids)], truncated=True)
