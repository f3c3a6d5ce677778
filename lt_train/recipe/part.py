"""The base of all parts of a recipe: strictness, bounded types, conflicts between settings and markers on them."""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lt_train.recipe.faults import Fault

MAY_CHANGE: dict[str, JsonValue] = {"may_change": True}
"""`json_schema_extra` of a setting that may change in a begun run; the stages redo what depends on it."""

ADDED: dict[str, JsonValue] = {"added": True}
"""`json_schema_extra` of a setting that runs of before do not have. At its default it enters no fingerprint, so they resume."""


PATH: dict[str, JsonValue] = {"path": True}
"""`json_schema_extra` of a setting whose value may be the path of a file or folder: it may count from the recipe's folder."""


def formerly(name: str) -> dict[str, JsonValue]:
    """`json_schema_extra` of a setting that recipes may still give under a former name."""
    return {"formerly": name}


MARKERS = ("may_change", "added", "path", "formerly")
"""Names of what `json_schema_extra` holds of ours."""

MOST = 10**12
"""Upper bound of every count: more tokens, steps or samples are a slip of the keyboard."""

Item = TypeVar("Item")


def value_fault(problem: str, fix: str) -> PydanticCustomError:
    """The error that a validator raises about one setting."""
    return PydanticCustomError("fault", "{problem}. Fix: {fix}", {"problem": problem, "fix": fix})


def _each_once(items: list[Item]) -> list[Item]:
    repeated = [item for at, item in enumerate(items) if item in items[:at]]
    if repeated:
        raise value_fault(f"{repeated[0]} is listed twice", "list it once")
    return items


def _short(size: Any) -> Any:
    """pydantic cannot parse a size of hundreds of digits."""
    if len(str(size)) > 30:
        raise value_fault("not a size in bytes", "write a number and a unit, such as 8GiB")
    return size


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
"""A count that may be 0."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Bytes = Annotated[ByteSize, BeforeValidator(_short), Field(ge=1, le=MOST * 1024)]
EachOnce = AfterValidator(_each_once)
"""Refuses a list that holds an item twice."""

COLLECTING = object()
"""`context` of a validation whose caller collects the conflicts of all parts; without it the first one is raised."""


class Part(BaseModel):
    """One mapping of settings. Unknown names, invalid types and conflicts between its settings are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)

    def conflicts(self) -> Iterator[Fault]:
        """Settings of this part that contradict each other; their paths count from this part."""
        yield from ()

    @model_validator(mode="after")
    def _without_conflicts(self, info: ValidationInfo) -> Self:
        conflict = None if info.context is COLLECTING else next(self.conflicts(), None)
        if conflict is not None:
            raise value_fault(f"{' + '.join(conflict.settings)}: {conflict.problem}", conflict.fix)
        return self


def twice(where: str, names: list[str | None]) -> Iterator[Fault]:
    """Two items of the list `where` that have one name."""
    for at, name in enumerate(names):
        if (first := names.index(name)) < at:
            problem = f"two items are named {name}"
            yield Fault((f"{where}.{at}.name", f"{where}.{first}.name"), problem, "give one of them another name")


def former_name(field: FieldInfo) -> str | None:
    """The name under which runs of before know a setting; None: it was never renamed."""
    extra = field.json_schema_extra
    name = extra.get("formerly") if isinstance(extra, dict) else None
    return name if isinstance(name, str) else None


def is_marked(field: FieldInfo, marker: dict[str, JsonValue]) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and marker.items() <= extra.items()


def names_marked(part: type["Part"], marker: dict[str, JsonValue]) -> set[str]:
    """The names of the settings with this marker, in this part and those inside it."""
    found: set[str] = set()
    for name, field in part.model_fields.items():
        found |= {name} if is_marked(field, marker) else set()
        for inner in parts_in(field.annotation):
            found |= names_marked(inner, marker)
    return found


def parts_in(annotation: Any) -> list[type[Part]]:
    """Every part that an annotation such as `list[Annotated[Eval | HeldoutLoss, …]] | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for inner in get_args(annotation) for part in parts_in(inner)]


@cache
def former_names(part: type[Part], above: str = "") -> dict[str, str]:
    """Dotted path of each setting under its former name, "*" for an index -> its name today."""
    found: dict[str, str] = {}
    for name, field in part.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "formerly" in extra:
            found[f"{above}{extra['formerly']}"] = name
        index = "*." if get_origin(field.annotation) is list else ""
        for inner in parts_in(field.annotation):
            found |= former_names(inner, f"{above}{name}.{index}")
    return found


def all_parts(value: Any, path: str = "") -> Iterator[tuple[str, Part]]:
    """A part and those inside it, each with its dotted path from there."""
    if isinstance(value, Part):
        yield path, value
        inner = [(name, getattr(value, name)) for name in type(value).model_fields]
    else:
        inner = [(str(at), item) for at, item in enumerate(value)] if isinstance(value, list) else []
    for name, item in inner:
        yield from all_parts(item, f"{path}.{name}" if path else name)
