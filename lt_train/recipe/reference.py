"""docs/recipes.md: every setting of a recipe, made from the schema.

python -m lt_train.recipe.reference > docs/recipes.md
"""

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lt_train.recipe.docstrings import setting_docstrings
from lt_train.recipe.part import MAY_CHANGE, Part, former_name, is_marked, parts_in
from lt_train.recipe.schema import Recipe

INTRODUCTION = """\
# Every setting of a recipe

Made from the schema by `python -m lt_train.recipe.reference > docs/recipes.md`. A setting without a default must be given. † marks
settings that may change in a begun run; what depends on them is redone.

A relative path counts from the working directory; what is not there is looked for in the recipe's own folder, and for a recipe in a
folder `recipes` also in the folder above. `lt-train recipes` lists the recipes that come with lt_train: `lt-train run quickstart`
finds them by name from any folder.
"""


def reference() -> str:
    """The page: a section for each part of a recipe, a row for each setting."""
    return "\n".join([INTRODUCTION, *_sections(Recipe, "", set())]).rstrip() + "\n"


def _sections(part: type[Part], path: str, shown: set[type[Part]]) -> Iterator[str]:
    shown.add(part)
    yield f"## {path or 'The recipe'}{f': {part.__name__}' if path.endswith('[]') else ''}\n"
    if part.__doc__ and part is not Recipe:
        yield f"{_one_line(part.__doc__)}\n"
    yield "| setting | type | default | |\n|---|---|---|---|"
    docstrings = setting_docstrings(part)
    for name, field in part.model_fields.items():
        former = former_name(field)
        note = _one_line(docstrings.get(name, "")) + (f" (formerly `{former}`)" if former else "")
        mark = "†" if is_marked(field, MAY_CHANGE) else ""
        yield f"| `{name}`{mark} | {_type(field.annotation)} | {_default(field)} | {_cell(note)} |"
    yield ""
    for name, field in part.model_fields.items():
        for inner in parts_in(field.annotation):
            if inner not in shown:
                several = "[]" if "list[" in str(field.annotation) else ""
                yield from _sections(inner, f"{path}.{name}{several}".lstrip("."), shown)


def _type(annotation: Any) -> str:
    """An annotation in the words of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return _cell("one of " + ", ".join(map(str, inner))) if len(inner) <= 12 else "a name"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if each is type(None) else _type(each) for each in inner))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "ByteSize": "bytes"}.get(
        getattr(annotation, "__name__", ""), "mapping"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Part):
        return ""
    return f"`{_cell(json.dumps(value, ensure_ascii=False))}`"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
