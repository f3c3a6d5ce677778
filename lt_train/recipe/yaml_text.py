"""From the text of a recipe, and `--set` overrides, to plain values; faults found on the way are kept, none is raised.

YAML as `yaml.safe_load` reads it, with two differences: `1e-5` is a number (YAML 1.1 takes it for text), and a key
given twice is a fault.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a setting is: ("eval", 0, "limit")."""


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class Fault:
    path: Path
    message: str


@dataclass
class RecipeText:
    """Values as written, where each was written ("line 7", "--set …"), and what was wrong with the writing."""

    values: Any
    origins: dict[Path, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def origin(self, path: Path) -> str | None:
        """Where `path`, or the nearest part around it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` and `1E5` as numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_recipe_text(text: str, overrides: Sequence[str] = ()) -> RecipeText:
    """Parse the YAML, then lay the overrides over it in their order."""
    recipe = _parse(text)
    if isinstance(recipe.values, dict):
        for override in overrides:
            _lay_over(recipe, override)
    return recipe


def parse_yaml(text: str) -> Any:
    """One YAML value.

    Raises:
        ValueError: not YAML, or a value that Python cannot hold, with a one-line reason.
    """
    return _construct(_compose(text))


def _parse(text: str) -> RecipeText:
    recipe = RecipeText(values=None)
    try:
        node = _compose(text)
        keys = list(_keys(node, (), frozenset()))  # before constructing, which writes what `<<` merges into the nodes
        recipe.values = _construct(node)
    except ValueError as error:
        recipe.faults.append(Fault((), str(error)))
        return recipe
    if not isinstance(recipe.values, dict):
        found = "is empty" if recipe.values is None else f"holds a {type(recipe.values).__name__}"
        recipe.faults.append(Fault((), f"the file {found}; a recipe is a mapping that starts with `name:`"))
        return recipe
    for path, key in keys:
        line = key.start_mark.line + 1
        if path in recipe.origins:
            recipe.faults.append(Fault(path, f"given twice, first on {recipe.origins[path]}, then on line {line}; keep one"))
        else:
            recipe.origins[path] = f"line {line}"
    return recipe


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _construct(node: yaml.Node | None) -> Any:
    """Node -> value. Besides YAML's errors the constructors raise ValueError, for example on the date 2024-13-45."""
    loader = _Loader("")
    try:
        return None if node is None else _unshared(loader.construct_document(node))
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    """Copy what an alias repeats, so that an override changes one place and not its twins.

    A value inside itself recurses too deeply.
    """
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {str(error).splitlines()[0]}"
    mark = error.problem_mark or error.context_mark
    what = "; ".join(part for part in (error.context, error.problem) if part)
    return f"not YAML: {what}" + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def _keys(node: yaml.Node | None, path: Path, above: frozenset[int]) -> Iterator[tuple[Path, yaml.Node]]:
    """Every key and list entry with its path. `above` are the nodes around this one: an alias may lead back to them."""
    if node is None or id(node) in above:
        return
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield (*path, index), entry
            yield from _keys(entry, (*path, index), above)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                yield (*path, key.value), key
                yield from _keys(value, (*path, key.value), above)


def _lay_over(recipe: RecipeText, override: str) -> None:
    """Apply one `a.b.0.c=value`. Parts absent on the way are made; the schema says later whether they may be."""
    dotted_path, equals, text = override.partition("=")
    names = [name.strip() for name in dotted_path.split(".")]
    if not equals or not all(names):
        recipe.faults.append(Fault((), f"--set {override}: write it as --set part.setting=value"))
        return
    try:
        value = parse_yaml(text)
    except ValueError as error:
        recipe.faults.append(Fault(tuple(names), f"--set {override}: the value is {error}"))
        return
    at, path = recipe.values, ()
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(at, list):
            if not name.isdecimal() or int(name) >= len(at):
                have = f"its entries are 0 to {len(at) - 1}" if at else "it is empty"
                recipe.faults.append(Fault((*path, name), f"--set {override}: {dotted(path)} is a list and {have}"))
                return
            key: str | int = int(name)
        elif isinstance(at, dict):
            key = name
        else:
            recipe.faults.append(Fault(path, f"--set {override}: {dotted(path)} is {at!r}; it has no settings inside"))
            return
        path = (*path, key)
        if last:
            _forget_origins(recipe, path)
            at[key] = value
        else:
            if isinstance(at, dict) and at.get(key) is None:
                at[key] = {}
            at = at[key]
    recipe.origins[path] = "--set"


def _forget_origins(recipe: RecipeText, path: Path) -> None:
    for known in [known for known in recipe.origins if known[: len(path)] == path]:
        del recipe.origins[known]
