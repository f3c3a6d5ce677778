"""Errors that a user can fix: shown without a traceback, exit code 2. Anything else is a bug and keeps its traceback."""

import reprlib
from datetime import date

LONGEST = 60
"""Characters of a name or value in a message."""


class UserError(Exception):
    """A recipe, file, checkpoint or command line of the user cannot be used.

    The message names the setting or file, the value, the reason and the fix.
    """


def more(section: str) -> str:
    """The end of a message that refers to docs/troubleshooting.md, to the heading with this anchor."""
    return f". More: docs/troubleshooting.md#{section}"


def half_character(text: str) -> UnicodeEncodeError | None:
    """Where (`start`, `end`) a text has lone surrogates such as \\ud800: JSON can hold them, no file or tokenizer takes them."""
    try:
        text.encode()  # of long texts ten times as fast as a search
    except UnicodeEncodeError as error:
        return error
    return None


class _Yaml(reprlib.Repr):
    """Python's repr with an upper length, and YAML's words for its constants and dates."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = LONGEST
        self.maxlevel = 3

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_date(self, value: date, level: int) -> str:
        return str(value)

    repr_datetime = repr_date

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"


shown = _Yaml().repr
"""A value as a message writes it."""


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}


def kind_of(value: object) -> str:
    """What a value from JSON or YAML is, in words, such as "a list"; "empty" for null and a list of nothing."""
    if value is None or value == []:
        return "empty"
    return shown(value) if isinstance(value, bool) else _KINDS.get(type(value), f"of type {type(value).__name__}")


def shortened(name: str, longest: int = LONGEST) -> str:
    """A name as a message writes it: its middle cut out, and in quotes where it does not print or its ends would not show."""
    half = longest // 2
    cut = name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
    return cut if cut and cut.isprintable() and cut == cut.strip() else shown(cut)
