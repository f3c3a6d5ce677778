"""Rows of every data format in one form: a conversation up to the answer, and the answer to train on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lt_train.dataset.prompts import Message
from lt_train.recipe.schema import Data
from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import load_rows

FIELDS = {
    "still": ("question", "combined_text"),
    "prompt_response": ("prompt", "response"),
    "messages": ("messages",),
}
"""The fields that a row of each format must have."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Sample:
    """One row: `messages` end with the user's turn that `answer` answers."""

    where: str
    messages: list[Message]
    answer: str


def read_samples(data: Data) -> Iterator[Sample]:
    """Rows in their one form.

    Raises:
        UserError: a row that is faulty, or none at all.
    """
    read = {"still": _still, "prompt_response": _prompt_response, "messages": _messages}[data.format]
    empty = True
    for where, row in load_rows(data.source, data.split, data.limit, data.subset):
        empty = False
        sample = read(where, row)
        if not sample.answer.strip():
            raise UserError(f"{where}: the answer is empty; take the row out, or fill it in")
        _encodable(sample)
        yield sample
    if empty:
        raise UserError(f"{data.source}: there are no rows in it")


def _encodable(sample: Sample) -> None:
    """JSON can hold half a character (a lone surrogate such as \\ud800), which no tokenizer takes."""
    for text in (*(message["content"] for message in sample.messages), sample.answer):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{sample.where}: there is half a character in {text[max(0, error.start - 20) :][:40]!r}; mend it"
            ) from error


def _still(where: str, row: Mapping[str, Any]) -> Sample:
    question, answer = (_text(where, row, field, "still") for field in FIELDS["still"])
    return Sample(where, _asked(where, question), answer)


def _prompt_response(where: str, row: Mapping[str, Any]) -> Sample:
    question, answer = (_text(where, row, field, "prompt_response") for field in FIELDS["prompt_response"])
    return Sample(where, _asked(where, question), answer)


def _messages(where: str, row: Mapping[str, Any]) -> Sample:
    """Trained on the last answer alone; earlier ones are part of the prompt."""
    messages = _field(where, row, "messages", "messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of {{role, content}}, this is {_kind(messages)}")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: messages[{at}] must have a role and a content, both text, this is {message!r:.100}")
        if message["role"] not in ROLES or (message["role"] == "system" and at > 0):
            known = ", ".join(ROLES)
            raise UserError(
                f"{where}: messages[{at}] has the role {message['role']!r}; roles are {known}, system only at the start"
            )
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise UserError(f"{where}: the last two messages must be of user and assistant: the question and the answer to train on")
    if not messages[-2]["content"].strip():
        raise UserError(f"{where}: the question is empty; take the row out, or fill it in")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Sample(where, turns[:-1], turns[-1]["content"])


def _asked(where: str, question: str) -> list[Message]:
    if not question.strip():
        raise UserError(f"{where}: the question is empty; take the row out, or fill it in")
    return [{"role": "user", "content": question}]


def _text(where: str, row: Mapping[str, Any], field: str, data_format: str) -> str:
    value = _field(where, row, field, data_format)
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} must be text, this is {_kind(value)}")
    return value


def _field(where: str, row: Mapping[str, Any], field: str, data_format: str) -> Any:
    if field in row:
        return row[field]
    fitting = [name for name, fields in FIELDS.items() if all(needed in row for needed in fields)]
    advice = f"; data.format: {fitting[0]} would fit" if fitting else ""
    has = ", ".join(map(str, row)) or "no fields"
    raise UserError(f"{where}: no field {field!r}, which data.format {data_format} needs; the row has {has}{advice}")


def _kind(value: Any) -> str:
    return "empty" if value is None or value == [] else f"of type {type(value).__name__}"
