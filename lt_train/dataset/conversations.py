"""Rows of every format in one form: a conversation up to the answer, and the answer to train on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lt_train.dataset.faults import RowFault, texts_in
from lt_train.dataset.formats import fitting_formats
from lt_train.dataset.messages import (
    REASONING,
    Message,
    is_list_of_messages,
    is_reasoning_name,
    parsed_list,
    read_messages,
    text_of,
)
from lt_train.recipe.columns import Columns
from lt_train.runtime.columns import value_at
from lt_train.runtime.errors import half_character, kind_of

SYSTEM_NAMES = ("system", "system_prompt", "system_message")
"""Columns that hold a row's own system turn."""

REFUSED_NAMES = ("tools", "functions", "chat_template_kwargs")
"""Columns that would change the prompt, which training here does not support."""

EARLIER_TURNS = "history"
"""Column of Alpaca's rows that holds the turns before the question."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One answer to train on: `messages` end with the user's turn that `answer` answers.

    Attributes:
        reasoning: what the data give apart from the answer; "" where they give none.
    """

    messages: tuple[Message, ...]
    answer: str
    reasoning: str = ""


def read_conversations(columns: Columns, chosen: str, row: Row) -> Iterator[Conversation]:
    """The conversations of a row: one, or of several verified answers one each.

    Args:
        chosen: how the fields were decided on, in words (`formats.chosen_format`).

    Raises:
        RowFault: the row is faulty, or holds something that would be lost.
    """
    fields = Fields(columns, chosen, row)
    _refuse_lost_columns(row)
    if columns.messages is not None:
        turns = read_messages(fields.value(columns.messages), columns.messages)
        yield fields.conversation(turns)
        return
    question = fields.question()
    for answer in fields.answers():
        yield fields.conversation([*question, *answer])


@dataclass(frozen=True)
class Fields:
    """One row, read by `columns`."""

    columns: Columns
    chosen: str
    row: Row

    def question(self) -> list[Message]:
        assert self.columns.question is not None
        value = self.value(self.columns.question)
        if is_list_of_messages(value):
            return read_messages(value, self.columns.question)
        question = self._text(self.columns.question, value)
        extra = self.row.get(self.columns.input) if self.columns.input else None
        if isinstance(extra, str) and extra.strip():
            question = f"{question}\n\n{extra}"
        return [{"role": "user", "content": question}]

    def answers(self) -> Iterator[list[Message]]:
        name = self.columns.answer
        assert name is not None
        value = self.value(name)
        if is_list_of_messages(value):
            turns = read_messages(value, name)
            if (count := sum(turn["role"] == "assistant" for turn in turns)) > 1:
                raise RowFault(
                    f"{name!r} holds {count} answers, of which the last alone would be trained on",
                    kind=f"several answers in {name}",
                    fix="make a row of each answer, with what comes before it in the prompt",
                )
            yield turns
        elif self.columns.verified:
            yield from ([{"role": "assistant", "content": answer}] for answer in self._verified(name, parsed_list(value)))
        else:
            yield [{"role": "assistant", "content": self._text(name, value)}]

    def conversation(self, turns: list[Message]) -> Conversation:
        if len(turns) > 1 and turns[0]["role"] == "system" and not turns[0]["content"].strip():
            turns = turns[1:]
        turns = self._with_system(turns)
        if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
            raise RowFault("the last two messages must be of user and assistant: the question and the answer to train on")
        if not turns[-2]["content"].strip():
            raise RowFault("the question is empty; take the row out, or fill it in")
        if not turns[-1]["content"].strip():
            raise RowFault("the answer is empty; take the row out, or fill it in")
        conversation = Conversation(tuple(turns[:-1]), turns[-1]["content"], self._reasoning(turns[-1]))
        _check_encodable(conversation)
        return conversation

    def value(self, name: str) -> Any:
        try:
            return value_at(self.row, name)
        except LookupError as error:
            fitting = fitting_formats(self.row) if self.chosen != "data.columns" else []
            raise RowFault(
                f"no field {name!r}, which {self.chosen} needs; the row has {', '.join(map(str, self.row)) or 'no fields'}"
                + (f" ({error})" if "." in name else "")
                + (f"; data.format: {fitting[0]} would fit" if fitting else ""),
                kind=f"no field {name}",
            ) from error

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise RowFault(f"{name!r} must be text, this is {kind_of(value)}", kind=f"{name} is no text")
        return value

    def _verified(self, name: str, answers: object) -> list[str]:
        """The answers of a list that are true in all the lists beside it."""
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise RowFault(f"{name!r} must be a list of texts, this is {kind_of(answers)}", kind=f"{name} is no list of texts")
        verdicts = [[True] * len(answers)]
        for beside in self.columns.verified:
            flags = parsed_list(self.value(beside))
            if not isinstance(flags, list) or len(flags) != len(answers):
                raise RowFault(f"{beside!r} must hold one true or false for each of {name!r}", kind=f"{beside} does not fit")
            verdicts.append(flags)
        return [answer for answer, *flags in zip(answers, *verdicts, strict=True) if all(flags)]

    def _with_system(self, turns: list[Message]) -> list[Message]:
        for name in [self.columns.system] if self.columns.system else SYSTEM_NAMES:
            value = self.value(name) if self.columns.system else self.row.get(name)
            system = value if isinstance(value, str) else None
            if value is not None and system is None:
                raise RowFault(f"{name!r} must be text, this is {kind_of(value)}", kind=f"{name} is no text")
            if system is None or not system.strip():
                continue
            if turns[0]["role"] != "system":
                return [{"role": "system", "content": system}, *turns]
            if turns[0]["content"].strip() != system.strip():
                raise RowFault(
                    f"the row has a system turn in {name!r} and another one in its messages",
                    kind="two system turns",
                    fix="keep one",
                )
        return turns

    def _reasoning(self, answer: Message) -> str:
        """The reasoning that the answer's message has, or the row beside it.

        Raises:
            RowFault: several columns hold different reasoning.
        """
        own = answer.get(REASONING, "")
        if self.columns.reasoning is not None:
            value = self.value(self.columns.reasoning)
            return self._text(self.columns.reasoning, text_of(value) or value)
        if self.chosen == "data.columns":
            return own
        beside = reasoning_columns(self.columns, self.row)
        unused = {name: text for name, text in beside.items() if text not in answer["content"] and text not in own}
        if not unused:
            return own
        if own or len(set(unused.values())) > 1:
            raise RowFault(
                f"the columns {', '.join(unused)} hold reasoning that would be lost",
                kind="several columns with reasoning",
                fix="name the fields to train on with data.columns: {question: …, reasoning: …, answer: …}",
            )
        return next(iter(unused.values()))


def reasoning_columns(columns: Columns, row: Row) -> dict[str, str]:
    """The columns beside `columns` that hold reasoning. One word is a label ("on", "high") and no reasoning."""
    used = {columns.messages, columns.question, columns.input, columns.answer, columns.reasoning}
    texts = {name: text_of(value).strip() for name, value in row.items() if name not in used and is_reasoning_name(name)}
    return {name: text for name, text in texts.items() if len(text.split()) > 1}


def _refuse_lost_columns(row: Row) -> None:
    if row.get("label") is False and "completion" in row:
        raise RowFault(
            "'label' is false: a completion that TRL's preference data have as an undesired one",
            kind="undesired completion",
            fix="take such rows out, or remove the column 'label'",
        )
    earlier = parsed_list(row.get(EARLIER_TURNS))
    if isinstance(earlier, list) and _says_something(earlier):
        raise RowFault(
            f"{EARLIER_TURNS!r} holds the turns before the question, which would be lost",
            kind=f"column {EARLIER_TURNS}",
            fix="write each row as messages, or take such rows out",
        )
    for name in REFUSED_NAMES:
        value = parsed_list(row.get(name))
        if _says_something(value):
            raise RowFault(
                f"{name!r} is not trained on, and would be lost",
                kind=f"column {name}",
                fix=f"remove the column {name!r}, or the rows that need it",
            )


def _says_something(value: object) -> bool:
    """Whether a value, however deep, is more than nothing: a text, a number, true or false."""
    if isinstance(value, dict | list | tuple):
        return any(map(_says_something, value.values() if isinstance(value, dict) else value))
    return value is not None and value != ""


def _check_encodable(conversation: Conversation) -> None:
    for text in (*texts_in(conversation.messages), conversation.answer, conversation.reasoning):
        if half := half_character(text):
            around = text[max(0, half.start - 20) :][:40]
            raise RowFault(f"there is half a character in {around!r}; correct it", kind="half a character")
