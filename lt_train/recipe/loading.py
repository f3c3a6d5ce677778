"""Reading of a YAML file and `--set` overrides as a checked recipe, and writing of its YAML.

yaml_text.py reads the text, schema.py declares the settings, messages.py turns pydantic's errors into faults, checks.py compares
settings across parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lt_train.recipe.checks import all_conflicts, remarks_on
from lt_train.recipe.faults import Fault
from lt_train.recipe.messages import validate_all
from lt_train.recipe.part import former_names
from lt_train.recipe.schema import Recipe
from lt_train.recipe.shipped import find_recipe, locate_files
from lt_train.recipe.yaml_text import read_recipe_text, to_yaml
from lt_train.runtime.errors import UserError, shortened

MOST_FAULTS = 50
"""Of more faults than these only the number is reported."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay `--set` overrides ("hybrid.w_recent=252") over it.

    Raises:
        UserError: one error that lists every fault of the file and of the overrides.
    """
    return load_recipe_and_remarks(path, overrides)[0]


def load_recipe_and_remarks(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Fault]]:
    """As `load_recipe`; also what works, but should be changed."""
    path = find_recipe(Path(path))
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        looked = shortened(str(path.absolute()), 300)
        problem = f"cannot be read: {error.strerror} (looked at {looked})"
        fix = "name a recipe file, or one of those that `lt-train recipes` lists"
        raise UserError(f"recipe {shortened(str(path), 300)}: {problem}. Fix: {fix}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 text ({error})") from error
    text = read_recipe_text(content, overrides, former_names(Recipe))
    faults = text.faults
    if isinstance(text.values, dict):
        recipe, faulty, replaced = validate_all(Recipe, locate_files(text.values, path))
        conflicting = [
            _with_both_places(conflict, path)
            for conflict in all_conflicts(recipe)
            if not any(_overlap(setting, other) for setting in conflict.settings for other in replaced)
        ]
        unread = {fault.settings for fault in faults}  # their values are no longer those that were written
        found = [fault for fault in (*faulty, *conflicting) if fault.settings not in unread]
        faults += [replace(fault, origin=text.origin(fault.settings[0]) or "") for fault in found]
    if faults:
        listed = [f"  {fault}" for fault in faults[:MOST_FAULTS]]
        more = [f"  … and {len(faults) - MOST_FAULTS:,} more"] if len(faults) > MOST_FAULTS else []
        raise UserError("\n".join([f"{shortened(str(path), 300)}: not a valid recipe", *listed, *more]))
    return recipe, [*text.remarks, *remarks_on(recipe)]


def recorded_recipe(text: str) -> Recipe:
    """The recipe that a run folder records, with today's names of its settings. No file that it names need exist.

    Raises:
        ValueError: not a recipe.
    """
    return Recipe.model_validate(read_recipe_text(text, former_names=former_names(Recipe)).values)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; load_recipe reads it back to an equal recipe."""
    return to_yaml(recipe.model_dump())


def _overlap(setting: str, other: str) -> bool:
    """Whether one of two settings is the other or is inside it."""
    shorter, longer = sorted((setting, other), key=len)
    return longer == shorter or longer.startswith(f"{shorter}.")


def _with_both_places(fault: Fault, recipe: Path) -> Fault:
    """A relative path counts from the working directory, else from the recipe's folder: both are named where it is in neither."""
    folder = recipe.absolute().parent
    if "there is no f" not in fault.problem or fault.problem.startswith(("/", "~")) or folder == Path.cwd():
        return fault
    return replace(fault, problem=f"{fault.problem}; nor is it in the recipe's folder {shortened(str(folder), 300)}")
