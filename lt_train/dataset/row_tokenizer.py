"""Rows become token ids, by several processes where there are many of them."""

import multiprocessing
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from lt_train.dataset.answers import AnswerWriter
from lt_train.dataset.conversations import Conversation, Row, read_conversations
from lt_train.dataset.faults import RowFault
from lt_train.dataset.special_tokens import encode, unquoted
from lt_train.recipe.columns import Columns
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of_text
from lt_train.runtime.interruption import end_at_sigterm, sigterm_held
from lt_train.runtime.processes import end_with

ROWS_AT_ONCE = 128
"""Rows in one task of a worker."""

TASKS_AHEAD = 4
"""Tasks of each worker that are begun before their rows are taken: many workers are faster than the one that writes."""

ROWS_WITHOUT_WORKERS = 512
"""Starting workers takes longer than to tokenize so few rows."""


@dataclass(frozen=True)
class TokenizedAnswer:
    """One answer and its prompt: `input_ids` of which the first `prompt_length` are the prompt's."""

    id: str
    question_id: str
    prompt_length: int
    input_ids: np.ndarray


@dataclass(frozen=True)
class TokenizedRow:
    """A tokenized row: its answers, or its fault."""

    where: str
    answers: tuple[TokenizedAnswer, ...] = ()
    fault: RowFault | None = None


PlacedRow = tuple[str, Row | RowFault]
"""Where a row is, and its fields or why they cannot be read."""


class RowTokenizer:
    """Tokenizes the rows of one data set for one base.

    Args:
        columns, chosen: the fields to read, and how they were decided on (`formats.chosen_format`).
        eos_ids: tokens besides the tokenizer's eos at which the model stops.

    Raises:
        UserError: the base's chat template or tokenizer cannot be trained with.
    """

    def __init__(
        self,
        data: Data,
        columns: Columns,
        chosen: str,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.columns = columns
        self.chosen = chosen
        self.tokenizer = tokenizer
        self.writer = AnswerWriter(data, prompt, tokenizer, eos_ids)

    def __call__(self, where: str, row: Row | RowFault) -> TokenizedRow:
        try:
            if isinstance(row, RowFault):
                raise row
            conversations = read_conversations(self.columns, self.chosen, row)
            return TokenizedRow(where, tuple(self._answer(conversation) for conversation in conversations))
        except RowFault as fault:
            return TokenizedRow(where, fault=fault)
        except UserError as error:  # the chat template refuses this conversation
            return TokenizedRow(where, fault=RowFault(str(error), kind=str(error).partition(":")[0]))

    def _answer(self, conversation: Conversation) -> TokenizedAnswer:
        text, end, special = self.writer.write(conversation), self.writer.end, self.writer.special
        prompt_ids = special.encode(text.prompt)
        answer_ids = self._answer_ids(text.prompt, prompt_ids, text.answer + end.text)
        if answer_ids[-1:] != [end.eos_id] or not self._hold(answer_ids, unquoted(text.answer) + end.text):
            raise RowFault(
                "the answer cannot be written in the tokenizer's tokens without loss",
                kind="unwritable answer",
                fix="take it out, or use a tokenizer that knows its characters",
            )
        return TokenizedAnswer(
            id=hash_of_text(unquoted(f"{text.prompt}\0{text.answer}")),
            question_id=hash_of_text(" ".join(conversation.messages[-1]["content"].split())),
            prompt_length=len(prompt_ids),
            input_ids=np.array([*prompt_ids, *answer_ids], dtype=np.int32),
        )

    def _answer_ids(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """The answer's ids as they follow the prompt; on their own where tokens would merge across the seam.

        A model generates after the prompt's own tokens, so these stay as they are. Tokenizing both as one text keeps
        SentencePiece from putting a space before the answer.
        """
        together = self.writer.special.encode(prompt + answer)
        if together[: len(prompt_ids)] == prompt_ids:
            return together[len(prompt_ids) :]
        return self.writer.special.encode(answer)

    def _hold(self, ids: list[int], text: str) -> bool:
        """Whether `ids` represent all of `text`, up to what the tokenizer's normaliser makes of it (Qwen's: Unicode NFC).

        A space before the first word is part of SentencePiece's first token, and not decoded at the start of a text.
        """
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and ids.count(unknown) > text.count(str(self.tokenizer.unk_token)):
            return False
        # As an array: of a list transformers checks every token.
        decoded = str(self.tokenizer.decode(np.array(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return decoded.lstrip(" ") == text.lstrip(" ") or encode(self.tokenizer, decoded) == encode(self.tokenizer, text)


def tokenized_rows(rows: Iterable[PlacedRow], tokenize: RowTokenizer, workers: int | None = None) -> Iterator[TokenizedRow]:
    """Every row in its order.

    Args:
        workers: processes; None: one for each core that this process may use.
    """
    rows = iter(rows)
    for where, row in islice(rows, ROWS_WITHOUT_WORKERS):
        yield tokenize(where, row)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    rest = next(chunks := iter(lambda: list(islice(rows, ROWS_AT_ONCE)), []), None)
    if rest is None:
        return
    if workers == 1:
        for where, row in chain(rest, rows):
            yield tokenize(where, row)
        return
    # Before the fork, or the tokenizers library warns in each worker that it will not use threads there.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    forking = multiprocessing.get_context("fork")  # the tokenizer is shared, not copied
    with sigterm_held():
        pool = forking.Pool(workers, _begin, (tokenize, os.getpid()))
    with pool:
        tasks = (pool.apply_async(_tokenize, (chunk,)) for chunk in chain([rest], chunks))
        begun = deque(islice(tasks, TASKS_AHEAD * workers))
        while begun:
            yield from begun.popleft().get()
            begun.extend(islice(tasks, 1))


_in_worker: RowTokenizer
"""Set in each worker when it starts."""


def _begin(tokenize: RowTokenizer, parent: int) -> None:
    global _in_worker
    end_at_sigterm()
    _in_worker = tokenize
    end_with(parent)  # a worker waits for its next task for ever, also when the process that gives tasks was killed


def _tokenize(rows: list[PlacedRow]) -> list[TokenizedRow]:
    return [_in_worker(where, row) for where, row in rows]
