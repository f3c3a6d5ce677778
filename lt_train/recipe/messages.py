"""pydantic's complaints in a user's words, all at once: stand-ins take the place of what is faulty."""

import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lt_train.recipe.yaml_text import Fault, Path, dotted

Schema = TypeVar("Schema", bound=BaseModel)

KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text; put it in quotes",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "finite_number": "a finite number",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


MOST_LISTED = 8
"""Of more allowed values than these only the one that may have been meant is named."""


def validate_all(schema: type[Schema], values: dict[str, Any], stand_ins: Mapping[str, Any]) -> tuple[Schema, list[Fault]]:
    """An instance of `schema`, and every fault of `values`; at a fault the instance holds a stand-in or the default.

    Args:
        stand_ins: a valid value for each setting and part that has no default, by dotted path without list indices.
    """
    faults: list[Fault] = []
    replaced: set[Path] = set()
    while True:
        try:
            return schema.model_validate(values), faults
        except ValidationError as error:
            found = [_fault(schema, details, values) for details in error.errors(include_url=False)]
            if all(fault.path in replaced for fault in found):
                raise  # a stand-in is itself faulty: a bug here, not the user's mistake
            faults += [fault for fault in found if not any(path[: len(fault.path)] == fault.path for path in replaced)]
            for fault in reversed(found):  # from a list's end, where taking one entry out moves no other
                values = _replaced(values, fault.path, stand_ins)
            replaced |= {fault.path for fault in found}


def _replaced(values: Any, path: Path, stand_ins: Mapping[str, Any], above: Path = ()) -> Any:
    """`values` with what lies at `path` replaced by its stand-in, or left out where the default serves."""
    if not path:
        return stand_ins[_pattern(above)]
    head, rest = path[0], path[1:]
    if isinstance(values, list):
        if not rest and _pattern((*above, head)) not in stand_ins:
            return values[:head] + values[head + 1 :]
        return [_replaced(item, rest, stand_ins, (*above, head)) if at == head else item for at, item in enumerate(values)]
    kept = {key: item for key, item in values.items() if key != head}
    if rest:
        return {**kept, head: _replaced(values[head], rest, stand_ins, (*above, head))}
    return {**kept, head: stand_ins[_pattern((*above, head))]} if _pattern((*above, head)) in stand_ins else kept


def _pattern(path: Path) -> str:
    return dotted(tuple("*" if isinstance(part, int) else part for part in path))


def _fault(schema: type[BaseModel], details: ErrorDetails, values: dict[str, Any]) -> Fault:
    path = _path(details["loc"], values)
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return Fault(path, _unknown(schema, path, values))
    if kind == "invalid_key":
        return Fault(path, "a setting's name must be text")
    if kind == "missing":
        return Fault(path, "missing")
    if kind == "union_tag_not_found":
        return Fault(path, "benchmark is missing; it says what is measured")
    if kind in ("literal_error", "union_tag_invalid"):
        tagged = kind == "union_tag_invalid"
        allowed = context["expected_tags" if tagged else "expected"].replace("'", "")
        given = context["tag"] if tagged else given
        names = allowed.replace(" or ", ", ").split(", ")
        close = did_you_mean(given, names)
        message = f"{given!r} is unknown{close}" if close and len(names) > MOST_LISTED else f"{given!r} is none of {allowed}{close}"
        return Fault(path, f"benchmark {message}" if tagged else message)
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        return Fault(path, f"{given!r} must be {words} {context[key]}")
    if kind == "string_pattern_mismatch":
        return Fault(
            path,
            f"{given!r} becomes a folder's name: start with a letter or digit, go on with these, '.', '_' or '-'",
        )
    if kind in ("too_short", "string_too_short"):
        return Fault(path, "must not be empty; leave it out for the default")
    if kind in KINDS:
        return Fault(path, f"{given!r} must be {KINDS[kind]}")
    return Fault(path, f"{given!r}: {details['msg']}")


def _path(loc: tuple[str | int, ...], values: dict[str, Any]) -> Path:
    """pydantic's location without its additions: the benchmark's name after the index of an `eval` entry, "[key]"."""
    path = tuple(part for part in loc if part != "[key]")
    if len(path) > 2 and path[0] == "eval" and values["eval"][path[1]].get("benchmark") == path[2]:
        return path[:2] + path[3:]
    return path


def did_you_mean(given: Any, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(schema: type[BaseModel], path: Path, values: dict[str, Any]) -> str:
    """Say what may have been meant by an unknown setting: a name of the same part, or the same name in another part."""
    around = _schemas_at(schema, path[:-1], values)
    names = sorted({name for part in around for name in part.model_fields})
    if _pattern(path) in _all_settings(schema):
        return f"no setting of this benchmark; it has {', '.join(names)}"
    if close := did_you_mean(path[-1], names):
        return f"unknown setting{close}"
    elsewhere = [name for name in _all_settings(schema) if name.rpartition(".")[2] == path[-1]]
    return f"unknown setting here; did you mean {elsewhere[0]}?" if elsewhere else f"unknown; there are {', '.join(names)}"


def _schemas_at(schema: type[BaseModel], path: Path, values: Any) -> list[type[BaseModel]]:
    """The part of the schema at `path`; of an eval entry's two kinds the one that its benchmark picks, if it does."""
    schemas = [schema]
    for name in path:
        values = values[name]
        if isinstance(name, str):
            schemas = [part for around in schemas for part in _parts_in(around.model_fields[name].annotation)]
    tag = values.get("benchmark")
    picked = [part for part in schemas if tag in typing.get_args(part.model_fields["benchmark"].annotation)] if tag else []
    return picked or schemas


def _parts_in(annotation: Any) -> list[type[BaseModel]]:
    """Every schema that an annotation such as `list[Annotated[A | B, …]] | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in typing.get_args(annotation) for part in _parts_in(inner)]


def _all_settings(schema: type[BaseModel], above: str = "") -> list[str]:
    """Every setting by its dotted path, "*" for the index in a list of parts."""
    names = []
    for name, field in schema.model_fields.items():
        index = "*." if typing.get_origin(field.annotation) is list else ""
        inner = [setting for part in _parts_in(field.annotation) for setting in _all_settings(part, f"{above}{name}.{index}")]
        names += inner or [f"{above}{name}"]
    return names
