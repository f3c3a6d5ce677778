"""A recipe as YAML in which a comment beside each setting gives the reason for its value."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lt_train.recipe.yaml_text import to_yaml

WIDTH = 120


def commented_yaml(values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """
    Args:
        values: of a recipe, by parts; what a part holds is on one line where it fits.
        reasons: dotted path of a setting -> its comment.
    """
    return "\n".join(_lines(values, reasons)) + "\n"


def _lines(values: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    for number, (name, value) in enumerate(values.items()):
        if number and (isinstance(value, dict | list) or name == "model"):
            yield ""
        if isinstance(value, dict) and value:
            yield f"{name}:"
            for inner, given in value.items():
                yield from _setting(inner, given, reasons.get(f"{name}.{inner}"), "  ")
        else:
            yield from _setting(name, value, reasons.get(name), "")


def _setting(name: str, value: Any, reason: str | None, indent: str) -> Iterator[str]:
    """The comment is behind a setting of one line, where both fit, else above it."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [f"{name}:", *(f"  - {_in_one_line(item)}" for item in value)]
    elif isinstance(value, dict | list):
        lines = [f"{name}: {_in_one_line(value)}"]
    else:
        lines = to_yaml({name: value}).splitlines()
    lines = [indent + line for line in lines]
    if reason is not None and len(lines) == 1 and len(f"{lines[0]}  # {reason}") <= WIDTH:
        lines = [f"{lines[0]}  # {reason}"]
    elif reason is not None:
        lines = [*textwrap.wrap(reason, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), *lines]
    yield from lines


def _in_one_line(value: Any) -> str:
    return to_yaml(value, in_one_line=True).strip()
