"""Lists of messages, by whatever keys their publisher uses, in one form: role, content and, of an assistant, its reasoning."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from lt_train.dataset.faults import RowFault, texts_in
from lt_train.runtime.errors import kind_of

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": …}; an assistant's may have REASONING."""

REASONING = "reasoning_content"
"""Key of a message that holds its reasoning, by any key that data have for it."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""The roles that data give, and the roles that chat templates know."""

_TRAINED_BY = ("weight", "train", "training")
"""Keys by which OpenAI's, Mistral's and axolotl's data exclude an assistant's message from the loss: 0, or false."""

_REASONING_NAME = re.compile(
    r"(^|_)(reasoning|thinking|thoughts?|think|cot|chain_of_thoughts?|rationale)(_(content|text|traces?|trajector(y|ies)|process|steps?))?$"
)


def is_reasoning_name(name: str) -> bool:
    """Whether a key or column of this name holds reasoning: reasoning_content, thinking, deepseek_reasoning, …"""
    return _REASONING_NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()) is not None


def read_messages(value: object, name: str) -> list[Message]:
    """A conversation in the one form.

    Args:
        value: a list of {role, content} or {from, value}, or such a list as JSON. name: of its field.

    Raises:
        RowFault: it is none, or holds text that would be lost.
    """
    turns = parsed_list(value)
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{name!r} must be a list of {{role, content}}, this is {kind_of(value)}", kind="no list of messages")
    messages = [_message(turn, f"{name}[{at}]", first=at == 0) for at, turn in enumerate(turns)]
    for key in _TRAINED_BY:
        if turns[-1].get(key) in (0, False) and messages[-1]["role"] == "assistant":
            raise RowFault(
                f"{name}[{len(turns) - 1}]: {key!r} is {turns[-1][key]!r}, so this answer is not to be trained on",
                kind=f"answer with {key} 0",
                fix="take such rows out",
            )
    return messages


def parsed_list(value: object) -> object:
    """The list that a text holds as JSON, or as Python writes it; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return value


def is_list_of_messages(value: object) -> bool:
    turns = parsed_list(value)
    return (
        isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)
    )


def _message(turn: object, where: str, first: bool) -> Message:
    shape = RowFault(f"{where} must have a role and a content, both text, this is {turn!r:.100}", kind="no role and content")
    if not isinstance(turn, dict):
        raise shape
    role_key = "role" if isinstance(turn.get("role"), str) else "from"
    content_key = "content" if "content" in turn else "value"
    role = turn.get(role_key)
    if not isinstance(role, str) or content_key not in turn:
        raise shape
    if role not in ROLES or (ROLES[role] == "system" and not first):
        known = "system, user (human), assistant (gpt)"
        raise RowFault(
            f"{where} has the role {role!r}; roles are {known}, system only at the start",
            kind=f"role {role}",
        )
    content, in_parts = _content(turn[content_key], where, shape)
    reasoning = _one_reasoning({**_reasoning_fields(turn), **in_parts}, where)
    for key, value in turn.items():
        lost = [text for text in texts_in(value) if text.strip() not in content and text.strip() not in reasoning]
        if lost and key not in (role_key, content_key):
            raise RowFault(
                f"{where}: the key {key!r} holds text that would be lost",
                kind=f"message key {key}",
                fix=f"remove {key!r}, or move its text into the content",
            )
    if reasoning and ROLES[role] != "assistant":
        raise RowFault(f"{where}: reasoning in a turn of {role}", kind="reasoning outside the assistant's turns")
    message = {"role": ROLES[role], "content": content}
    return {**message, REASONING: reasoning} if reasoning else message


def _reasoning_fields(turn: Mapping[str, Any]) -> dict[str, str]:
    fields = {key: text_of(value) for key, value in turn.items() if is_reasoning_name(key)}
    return {key: text for key, text in fields.items() if text.strip()}


def _one_reasoning(fields: Mapping[str, str], where: str) -> str:
    """The reasoning that is given once or several times alike; "" where none is."""
    texts = {text.strip() for text in fields.values()}
    if len(texts) > 1:
        raise RowFault(
            f"{where}: {', '.join(fields)} hold different reasoning", kind="two kinds of reasoning", fix="keep one of them"
        )
    return next(iter(fields.values()), "")


def text_of(value: object) -> str:
    """A text, or a list of one text; "" for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else ""


def _content(value: object, where: str, shape: RowFault) -> tuple[str, dict[str, str]]:
    """The text of a content that is a text or a list of parts, and the reasoning among the parts."""
    if value is None or isinstance(value, str):
        return value or "", {}
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise shape
    texts: list[str] = []
    reasoning: list[str] = []
    for part in value:
        kind = str(part.get("type", "text"))
        fields = [key for key in part if key != "type" and list(texts_in(part[key]))]
        if kind != "text" and not is_reasoning_name(kind):
            raise RowFault(f"{where}: a part of the content is of type {kind!r}; only text can be trained on", kind=f"part {kind}")
        if len(fields) > 1 or not all(isinstance(part[key], str) for key in fields):
            raise RowFault(
                f"{where}: a part of the content must hold one text, this holds {', '.join(fields)}", kind="part of a content"
            )
        (texts if kind == "text" else reasoning).extend(
            text for key, text in part.items() if key != "type" and isinstance(text, str)
        )
    return "".join(texts), {"content": "\n\n".join(reasoning)} if reasoning else {}
