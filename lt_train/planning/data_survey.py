"""A look at data before there is a recipe: their format, the lengths of their samples in tokens, and how they write reasoning."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.conversations import Conversation, read_conversations
from lt_train.dataset.faults import FaultyRows, RowFault
from lt_train.dataset.formats import FORMATS, chosen_format
from lt_train.dataset.reasoning import SETTING, BaseReasoning, known_tags, tags_of_answer
from lt_train.dataset.row_tokenizer import RowTokenizer
from lt_train.recipe.columns import Columns
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.data_files import PlacedRow
from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import read_rows

LOOKED_AT = 512
"""Rows that are looked at, drawn from all of them."""

BYTES_PER_TOKEN = 3
"""Of UTF-8, where no tokenizer counts. Qwen3's has 4.3 of traces in English; formulas have fewer, so this rather overestimates."""


@dataclass(frozen=True)
class DataSurvey:
    """
    Attributes:
        rows: of the data.
        looked_at: rows that were read as conversations.
        format: as in data.format.
        chosen: the format in words.
        lengths: tokens of each sample looked at, prompt and answer, ascending.
        counted: by the base's tokenizer; else estimated from bytes.
        with_reasoning: samples looked at that hold reasoning.
        converted: why data.reasoning_tags has to be convert; None where it has not.
        faulty: rows looked at that cannot be trained on.
    """

    rows: int
    looked_at: int
    format: str
    chosen: str
    lengths: tuple[int, ...]
    counted: bool
    with_reasoning: int
    converted: str | None
    faulty: FaultyRows

    @property
    def median(self) -> int:
        return self.quantile(0.5)

    def quantile(self, fraction: float) -> int:
        """The shortest length that this fraction of the samples does not exceed."""
        return self.lengths[min(int(fraction * len(self.lengths)), len(self.lengths) - 1)]

    def longer_than(self, length: int) -> int:
        return sum(tokens > length for tokens in self.lengths)


def survey_data(
    source: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, eos_ids: Collection[int], model_max_length: int
) -> DataSurvey:
    """
    Args:
        tokenizer: the base's, where it is local.

    Raises:
        UserError: unreadable data, an unknown format, no row that can be trained on, or no reasoning in any of them.
    """
    data = Data(source=source, max_length=model_max_length)
    rows, count = _drawn_rows(source)
    chosen, columns = _format(data, rows)
    conversations, faulty = _conversations(rows, columns, chosen)
    reasoning = sum(_has_reasoning(conversation) for conversation in conversations)
    converted = None
    if tokenizer is None:
        lengths = [_estimated(conversation) for conversation in conversations]
    else:
        lengths, faulty = _tokenized(rows, RowTokenizer(data, columns, chosen, prompt, tokenizer, eos_ids))
        problems = [kind.problem for kind in faulty.kinds.values() if f"{SETTING}: convert" in kind.fix]
        if problems:
            converted = problems[0].removeprefix(f"{SETTING}: null: ")
            data = data.model_copy(update={"reasoning_tags": "convert"})
            lengths, faulty = _tokenized(rows, RowTokenizer(data, columns, chosen, prompt, tokenizer, eos_ids))
    if faulty.count and not lengths:
        raise faulty.error(source, f"{len(rows):,} rows")
    if not lengths:
        raise UserError(f"data.source: {source}: no answer in it is verified. Fix: give data with verified answers")
    if len(lengths) < 2:
        raise UserError(f"data.source: {source}: one sample of it can be trained on: too few. Fix: give at least two")
    if not reasoning:
        opening, closing = known_tags(None)[0].opening, known_tags(None)[0].closing
        raise UserError(
            f"data.source: {source}: none of the {len(conversations):,} samples looked at holds reasoning. "
            f"Fix: give traces with it, between {opening} and {closing} or in a column of its own"
        )
    name = next((name for name, fields in FORMATS.items() if fields == columns), "auto")
    return DataSurvey(count, len(rows), name, chosen, tuple(sorted(lengths)), tokenizer is not None, reasoning, converted, faulty)


def _drawn_rows(source: str) -> tuple[list[PlacedRow], int]:
    """Rows in their order, and the number of all (algorithm R, Vitter 1985)."""
    rng, kept, count = random.Random(0), list[tuple[int, PlacedRow]](), 0
    for count, row in enumerate(read_rows(source), start=1):
        if len(kept) < LOOKED_AT:
            kept.append((count, row))
        elif (at := rng.randrange(count)) < LOOKED_AT:
            kept[at] = (count, row)
    if count < 2:
        raise UserError(f"data.source: {source}: {count or 'no'} row{'s' if not count else ''}: too few. Fix: give at least two")
    return [row for _, row in sorted(kept, key=lambda numbered: numbered[0])], count


def _format(data: Data, rows: Sequence[PlacedRow]) -> tuple[str, Columns]:
    """The format of the first readable row."""
    faulty = FaultyRows()
    for where, row in rows:
        if isinstance(row, str):
            faulty.add(where, RowFault(row, kind="unreadable row"))
            continue
        try:
            return chosen_format(data, row)
        except RowFault as fault:
            raise UserError(f"{where}: {fault.problem}. Fix: {fault.fix}") from fault
    raise faulty.error(data.traces, f"{len(rows):,} rows")


def _conversations(rows: Sequence[PlacedRow], columns: Columns, chosen: str) -> tuple[list[Conversation], FaultyRows]:
    found, faulty = list[Conversation](), FaultyRows()
    for where, row in rows:
        try:
            if isinstance(row, str):
                raise RowFault(row, kind="unreadable row")
            found += read_conversations(columns, chosen, row)
        except RowFault as fault:
            faulty.add(where, fault)
    return found, faulty


def _tokenized(rows: Sequence[PlacedRow], tokenize: RowTokenizer) -> tuple[list[int], FaultyRows]:
    lengths, faulty = list[int](), FaultyRows()
    for where, row in rows:
        found = tokenize(where, RowFault(row, kind="unreadable row") if isinstance(row, str) else row)
        if found.fault is not None:
            faulty.add(where, found.fault)
        lengths += [len(answer.input_ids) for answer in found.answers]
    return lengths, faulty


def _has_reasoning(conversation: Conversation) -> bool:
    return bool(conversation.reasoning) or tags_of_answer(conversation.answer, BaseReasoning(None), known_tags(None)) is not None


def _estimated(conversation: Conversation) -> int:
    texts = [*(message["content"] for message in conversation.messages), conversation.reasoning, conversation.answer]
    return -(-sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // BYTES_PER_TOKEN)
