"""Values of a row by name: a column, or a dotted path into what a column holds."""

import json
from collections.abc import Mapping
from typing import Any

from lt_train.runtime.errors import kind_of


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `answer`, `metadata.answer` or `thinking_trajectories.0`.

    A column whose own name has dots comes first. JSON in a text is parsed where the path leads into it.

    Raises:
        LookupError: nothing is at the path; its text names the part that was found.
    """
    if path in row:
        return row[path]
    value: Any = row
    walked: list[str] = []
    for name in path.split("."):
        value = _inside(value, name, ".".join(walked))
        walked.append(name)
    return value


def _inside(value: Any, name: str, path: str) -> Any:
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping) and name in value:
        return value[name]
    if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
        return value[int(name)]
    place = f"{path!r} holds" if path else "the row has"
    if isinstance(value, Mapping):
        raise LookupError(f"no field {name!r}: {place} {', '.join(map(str, value)) or 'no fields'}")
    if isinstance(value, list):
        raise LookupError(f"no item {name}: {place} a list of {len(value)}, counted from 0")
    raise LookupError(f"no field {name!r}: {place} {'nothing' if value is None else kind_of(value)}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
