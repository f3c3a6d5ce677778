"""Reading of a recipe's text and of `--set` overrides as plain values; faults are collected, none is raised.

YAML as `yaml.safe_load` reads it, with these differences. Numbers are those of YAML 1.2: `1e-5` is a number, and `012` and `1:30`
are text (YAML 1.1 reads 10 and 90). A key that is given twice, a key that is not text and an explicit tag are faults.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from lt_train.recipe.faults import Fault
from lt_train.runtime.errors import half_character, kind_of, shortened, shown

Path = tuple[str | int, ...]
"""Where a setting is: ("eval", 0, "limit")."""

MOST_VALUES = 10_000
"""More values than this, counting what an alias repeats, are refused: a few lines of aliases can repeat millions."""

MERGE, TEXT, DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("merge", "str", "timestamp"))

DEEPEST = 50
"""Levels of nesting. A value that contains itself by an alias is deeper than any."""


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def pattern(path: Path) -> str:
    """A dotted path with "*" for each index."""
    return dotted(tuple("*" if isinstance(name, int) else name for name in path))


@dataclass
class RecipeText:
    """The values and faults of a recipe's text.

    Attributes:
        values: as written, under the names that settings have today.
        origins: where each was written: "line 7", "--set".
        faults: of the syntax.
        remarks: former names of settings that were found.
        former_names: dotted path under the former name, "*" for an index -> name today.
    """

    values: Any = None
    origins: dict[Path, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[Fault] = field(default_factory=list)
    former_names: Mapping[str, str] = field(default_factory=dict)

    def origin(self, setting: str) -> str | None:
        """The place where the setting with this dotted path, or the nearest part around it, was written."""
        path = tuple(int(name) if name.isdecimal() and len(name) < 10 else name for name in setting.split("."))
        found = (self.origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.origins)
        return next(found, None)

    def today(self, path: Path, origin: str) -> str:
        """The last name of a path as it is called today. A former name is remarked on."""
        name = self.former_names.get(pattern(path))
        if name is None:
            return str(path[-1])
        self.remarks.append(Fault((dotted(path),), "former name of a setting", f"write {name}", origin))
        return name


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for tag, expression in (
    ("int", r"[-+]?(0|[1-9][0-9_]{0,999}|0x[0-9a-fA-F]{1,16})$"),
    ("float", r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(expression), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what _Loader alone reads as a number: the text "1e5"."""


for first, resolvers in _Loader.yaml_implicit_resolvers.items():
    for tag, regular_expression in resolvers:
        _Dumper.add_implicit_resolver(tag, regular_expression, [first])


def to_yaml(values: Any, in_one_line: bool = False) -> str:
    """Plain values as YAML that this module, and any reader of YAML 1.1, reads back.

    Args:
        in_one_line: of a list or mapping.
    """
    width = sys.maxsize if in_one_line else 120
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=in_one_line)


def read_recipe_text(text: str, overrides: Sequence[str] = (), former_names: Mapping[str, str] | None = None) -> RecipeText:
    """Parse the YAML, then lay the overrides over it in their order."""
    recipe = RecipeText(former_names=former_names or {})
    try:
        recipe.values = _read(text, recipe)
    except ValueError as error:
        recipe.faults.append(Fault((), str(error)))
        return recipe
    if not isinstance(recipe.values, dict):
        kind = kind_of(recipe.values)
        found = "is empty" if kind == "empty" else f"holds {kind}"
        recipe.faults.append(Fault((), f"the file {found}", "write a mapping of settings that starts with `name:`"))
        return recipe
    for override in overrides:
        _lay_over(recipe, override)
    return recipe


def _read(text: str, recipe: RecipeText, at: Path = (), origin: str = "") -> Any:
    """The value that `text` holds. What is found on the way goes into `recipe`.

    Args:
        at: the value's place in the recipe.
        origin: where the text comes from; empty: from the file, whose lines are recorded.

    Raises:
        ValueError: not YAML, or too much or too deep, with a one-line reason.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for count, (path, inner) in enumerate(_nodes(node, at), start=1):
            if count > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES:,} values, counting those that aliases repeat")
            _check_value(loader, inner, path, recipe, origin)
            if isinstance(inner, yaml.MappingNode):
                _check_names(inner, path, recipe, origin)
            elif isinstance(inner, yaml.SequenceNode) and not origin:
                recipe.origins |= {(*path, index): _line(item) for index, item in enumerate(inner.value)}
        return _unshared(loader.construct_document(node))
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _nodes(node: yaml.Node, path: Path) -> Iterator[tuple[Path, yaml.Node]]:
    """Every value with its path, those that an alias repeats each time."""
    if len(path) > DEEPEST:
        raise ValueError("nested too deeply")
    yield path, node
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _nodes(item, (*path, index))
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(value, (*path, _name(name)))


def _check_value(loader: _Loader, node: yaml.Node, path: Path, recipe: RecipeText, origin: str) -> None:
    """Report an explicit tag, and read the value as if there were none; report a value that Python cannot hold."""
    plain = getattr(node, "style", None) is None
    expected = loader.resolve(type(node), node.value, (plain, not plain))
    if node.tag != expected:
        tag = shortened(node.tag.replace("tag:yaml.org,2002:", "!!"))
        recipe.faults.append(
            Fault((dotted(path),), f"tag {tag} is not read", "remove it, and put text in quotes", origin or _line(node))
        )
        node.tag = expected
    if isinstance(node, yaml.ScalarNode) and (unreadable := _unreadable(loader, node)):
        recipe.faults.append(Fault((dotted(path),), *unreadable, origin or _line(node)))
        node.tag, node.value = TEXT, ""


def _check_names(node: yaml.MappingNode, path: Path, recipe: RecipeText, origin: str) -> None:
    """Record where each setting is written; report and remove names that are not text."""
    kept: list[tuple[yaml.Node, yaml.Node]] = []
    seen: dict[str, str] = {}
    for name, value in node.value:
        if problem := _half_character(_name(name)):
            raise ValueError(problem)
        here, where = dotted((*path, _name(name))), origin or _line(name)
        if name.tag == MERGE:
            kept.append((name, value))
        elif name.tag != TEXT:
            recipe.faults.append(Fault((here,), "the name of a setting is not text", "put it in quotes", where))
        else:
            kept.append((name, value))
            name.value = recipe.today((*path, name.value), where)
            if name.value in seen:
                twice = Fault((here,), f"given twice, first on {seen[name.value]}", "keep one", where)
                recipe.faults.append(twice)
            seen.setdefault(name.value, where)
            if not origin:
                recipe.origins[(*path, name.value)] = where
    node.value = kept


def _name(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else "?"


def _unreadable(loader: _Loader, node: yaml.ScalarNode) -> tuple[str, str] | None:
    """The problem and the fix of a value that Python cannot hold; None: it can."""
    if problem := _half_character(node.value):
        return problem, "remove it"
    if node.tag == DATE:
        try:
            loader.construct_yaml_timestamp(node)
        except ValueError as error:
            return f"{shown(node.value)}: {error}", "put it in quotes"
    return None


def _half_character(text: str) -> str | None:
    """Why no file can hold a text; None: a file can."""
    return f"{shown(text)}: half of a character (a lone surrogate)" if half_character(text) else None


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _unshared(value: Any) -> Any:
    """A copy in which what an alias repeats is written out, so that an override changes one place and not its duplicates."""
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


def _lay_over(recipe: RecipeText, override: str) -> None:
    """Apply one `a.b.0.c=value`. Parts absent on the way are made; the schema decides later whether they may be."""
    setting, equals, text = override.partition("=")
    names = [name.strip() for name in setting.split(".")]

    def refuse(problem: str, fix: str = "", at: tuple[str, ...] = (".".join(names),)) -> None:
        recipe.faults.append(Fault(at, problem, fix, "--set"))

    if problem := _half_character(override):
        return refuse(problem, at=())
    if not equals or not all(names):
        return refuse(f"{shown(override)}: not an override", "write it as --set part.setting=value", at=())
    around: Any = recipe.values
    path: Path = ()
    for depth, name in enumerate(names):
        if isinstance(around, list):
            index = next((at for at in range(len(around)) if str(at) == name), None)
            if index is None:
                have = f"has the items 0 to {len(around) - 1}" if around else "is empty"
                return refuse(f"the list {dotted(path)} {have}", "name one of its items")
            path = (*path, index)
        elif isinstance(around, dict):
            path = (*path, recipe.today((*path, name), "--set"))
        else:
            return refuse(f"{dotted(path)} is {shown(around)}, which has no settings inside", "set all of it")
        if depth == len(names) - 1:
            break
        if isinstance(around, dict) and around.get(path[-1]) is None:
            around[path[-1]] = {}
        around = around[path[-1]]
    try:
        value = _read(text, recipe, path, "--set")
    except ValueError as error:
        return refuse(f"{shown(text)}: {error}")
    around[path[-1]] = value
    recipe.origins = {known: line for known, line in recipe.origins.items() if known[: len(path)] != path} | {path: "--set"}
