"""The tokenized examples of a data set on disk.

examples.arrow     all examples, in the order of the rows
examples.json      what became of the rows, and which examples are held out
"""

import random
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from lt_train.dataset.conversations import reasoning_columns
from lt_train.dataset.examples import IGNORED, ExampleSet, StoredExamples, examples_fingerprint
from lt_train.dataset.faults import RowFault
from lt_train.dataset.formats import chosen_format
from lt_train.dataset.row_tokenizer import PlacedRow, RowTokenizer, TokenizedAnswer, tokenized_rows
from lt_train.dataset.tally import Tally
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.progress import show_progress
from lt_train.runtime.sources import read_rows

TABLE, RECORD = "examples.arrow", "examples.json"

ROWS_BEFORE_WRITING = 100
"""Examples that are held in memory until they are written; 1,000 by default, which of long traces are gigabytes."""

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "where": datasets.Value("string"),
        "question_id": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
        "prompt_length": datasets.Value("int32"),
        "length": datasets.Value("int32"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)
"""Columns of stored examples."""


@dataclass(frozen=True)
class Inputs:
    """All that the examples of a data set follow from."""

    data: Data
    prompt: Prompt
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    seed: int


def write_examples(inputs: Inputs, folder: Path, workers: int | None, progress: bool) -> None:
    """Tokenize all rows into `folder`.

    Raises:
        UserError: see `loading.load_examples`.
    """
    data, tally = inputs.data, Tally(inputs.data)
    rows, tokenize, warnings = _opened(inputs)
    questions: list[str] = []
    ids: Counter[str] = Counter()
    named = uuid.uuid4().hex  # datasets hashes a table without a fingerprint whenever it is opened
    writing = ArrowWriter(path=str(folder / TABLE), features=FEATURES, writer_batch_size=ROWS_BEFORE_WRITING, fingerprint=named)
    with writing as writer, show_progress("tokenizing", shown=progress) as bar:
        for row in tokenized_rows(rows, tokenize, workers):
            for answer in tally.kept(row):
                ids[answer.id] += 1
                questions.append(answer.question_id)
                writer.write(_columns(answer, row.where, ids[answer.id], data.max_length))
            bar.advance()
        writer.finalize()
    tally.check()
    heldout = _heldout(questions, data.heldout, inputs.seed, tally)
    tally.counts.update(train=len(questions) - len(heldout), heldout=len(heldout))
    record = {
        "counts": dict(tally.counts),
        "format": tokenize.chosen,
        "warnings": [*warnings, *tally.warnings()],
        "heldout": heldout,
        "train_sha256": examples_fingerprint(StoredExamples(_train(_table(folder), heldout))),
    }
    write_json(folder / RECORD, record)


def read_examples(folder: Path, *, in_memory: bool = False) -> ExampleSet:
    """The examples that `write_examples` left in a folder, memory-mapped."""
    record = read_json(folder / RECORD, "record of tokenized data")
    table = _table(folder, in_memory)
    return ExampleSet(
        train=StoredExamples(_train(table, record["heldout"]), record["train_sha256"]),
        heldout=StoredExamples(table.select(record["heldout"])),
        counts=record["counts"],
        format=record["format"],
        warnings=tuple(record["warnings"]),
    )


def _table(folder: Path, in_memory: bool = False) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(folder / TABLE), in_memory=in_memory)


def _train(table: datasets.Dataset, heldout: Sequence[int]) -> datasets.Dataset:
    return table.select(np.setdiff1d(np.arange(len(table)), heldout)) if heldout else table


def _opened(inputs: Inputs) -> tuple[Iterator[PlacedRow], RowTokenizer, list[str]]:
    """The rows, what tokenizes them, and what a user should know of their format, which the first of them shows.

    Raises:
        UserError: there are none, or their format is unknown.
    """
    data = inputs.data
    rows = _placed_rows(data)
    before: list[PlacedRow] = []
    for where, row in rows:
        before.append((where, row))
        if isinstance(row, RowFault):
            continue
        try:
            chosen, columns = chosen_format(data, row)
        except RowFault as fault:
            raise UserError(f"{where}: {fault.problem}. Fix: {fault.fix}") from fault
        tokenize = RowTokenizer(data, columns, chosen, inputs.prompt, inputs.tokenizer, inputs.eos_ids)
        unread = reasoning_columns(columns, row) if data.columns is not None else {}
        unread = unread if columns.reasoning is None else {}
        lost = [f"data.columns: the rows hold reasoning in {name}, which is left out" for name in unread]
        return chain(before, rows), tokenize, lost
    if not before:
        raise UserError(f"{data.traces}: there are no rows in it")
    tally = Tally(data)
    for where, row in before:
        if isinstance(row, RowFault):
            tally.add_fault(where, row)
    raise tally.error()


def _placed_rows(data: Data) -> Iterator[PlacedRow]:
    for where, row in read_rows(data.traces, data.split, data.limit, data.subset):
        yield where, RowFault(row, kind="unreadable row") if isinstance(row, str) else row


def _columns(answer: TokenizedAnswer, where: str, number: int, max_length: int) -> dict[str, Any]:
    """A row of the table; equal answers to one question get "-2", "-3" behind their id."""
    prompt, ids = answer.prompt_length, answer.input_ids[:max_length]
    return {
        "id": answer.id if number == 1 else f"{answer.id}-{number}",
        "where": where,
        "question_id": answer.question_id,
        "truncated": len(ids) < len(answer.input_ids),
        "prompt_length": prompt,
        "length": len(ids),
        "input_ids": ids,
        "labels": np.concatenate([np.full(prompt, IGNORED, dtype=np.int32), ids[prompt:]]),
    }


def _heldout(questions: Sequence[str], count: int, seed: int, tally: Tally) -> list[int]:
    """Indices of `count` examples drawn by the seed; all answers to one question fall on the same side."""
    answers: dict[str, list[int]] = {}
    for at, question in enumerate(questions):
        answers.setdefault(question, []).append(at)
    drawn = list(answers.values())
    random.Random(f"heldout {seed}").shuffle(drawn)
    aside: list[int] = []
    for group in drawn:
        if len(aside) + len(group) <= count:
            aside += group
    if len(aside) < count or len(aside) == len(questions):
        raise UserError(
            f"data.heldout: {count} samples cannot be set aside from {len(questions)} with {len(answers)} different questions "
            f"so that some are left to train on ({tally}); lower it"
        )
    return sorted(aside)
