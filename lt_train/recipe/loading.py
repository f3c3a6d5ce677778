"""From a YAML file and `--set` overrides to a checked recipe, and back to YAML.

yaml_text.py reads the text, schema.py says what may stand in it, messages.py words pydantic's complaints, checks.py compares
settings across parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lt_train.recipe.checks import all_conflicts
from lt_train.recipe.messages import validate_all
from lt_train.recipe.schema import Recipe
from lt_train.recipe.yaml_text import RecipeText, read_recipe_text
from lt_train.runtime.errors import UserError


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay `--set` overrides ("hybrid.w_recent=252") over it.

    Raises:
        UserError: one error that lists every fault of the file and of the overrides.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read: {error.strerror} (looked at {path.absolute()})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 text ({error})") from error
    return _check(read_recipe_text(text, overrides), path)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; load_recipe reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def _check(text: RecipeText, path: Path) -> Recipe:
    faults = text.faults
    if isinstance(text.values, dict):
        recipe, faulty, replaced = validate_all(Recipe, _with_defaults_that_depend(text.values))
        conflicting = [
            conflict
            for conflict in all_conflicts(recipe)
            if not any(_overlap(setting, other) for setting in conflict.settings for other in replaced)
        ]
        faults += [replace(fault, origin=text.origin(fault.settings[0]) or "") for fault in (*faulty, *conflicting)]
    if faults:
        raise UserError("\n".join([f"{path}: not a valid recipe", *(f"  {fault}" for fault in faults)]))
    return recipe


def _with_defaults_that_depend(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what depends on another part: a lora part where the method is lora, and what each evaluation looks at."""
    train, entries = values.get("train"), values.get("eval")
    filled = dict(values)
    if isinstance(train, dict) and train.get("method") == "lora" and values.get("lora") is None:
        filled["lora"] = {}
    if isinstance(entries, list):
        default = ["converted"] if train is None else ["trained"]
        filled["eval"] = [
            {**entry, "of": default} if isinstance(entry, dict) and entry.get("of") is None else entry for entry in entries
        ]
    return filled


def _overlap(setting: str, other: str) -> bool:
    """Whether one of two settings is the other or lies inside it."""
    shorter, longer = sorted((setting, other), key=len)
    return longer == shorter or longer.startswith(f"{shorter}.")
