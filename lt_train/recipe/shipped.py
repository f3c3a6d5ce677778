"""The recipes that come with lt_train, and the files that they name: `lt-train run quickstart` finds them from any folder.

They are in the repository, where lt_train runs from one (`pip install -e .`), else where the wheel's data files were installed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from lt_train.recipe.part import PATH, names_marked
from lt_train.recipe.schema import Recipe
from lt_train.runtime.errors import UserError, shortened

INSTALLED = "share/lt_train/recipes/quickstart.yaml"

HARDWARE = re.compile(r"\bon (\d+ GPUs? of \d+ GB|a CPU with \d+ GB)(?:, (?:training )?(\d+ (?:h|min)))?")


def shipped_recipes() -> list[Path]:
    """
    Raises:
        UserError: the installation lacks them.
    """
    folder = _folder()
    return [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]


def _folder() -> Path:
    repository = Path(__file__).parents[2] / "recipes"
    if (repository / "quickstart.yaml").is_file():
        return repository
    try:
        installed = [file for file in files("lt-train") or () if str(file).endswith(INSTALLED)]
    except PackageNotFoundError:
        installed = []
    if not installed:
        raise UserError("RECIPE: this installation of lt_train holds no recipes. Fix: install it again, or name a recipe file")
    return Path(str(installed[0].locate())).resolve().parent


def find_recipe(name: Path, given_as: str = "RECIPE") -> Path:
    """The file of this name, else the shipped recipe of which it is the bare name ("quickstart").

    Args:
        given_as: the argument or option that named it, for the message.

    Raises:
        UserError: a bare name that is neither.
    """
    if _exists(name) or name.suffix or len(name.parts) != 1:
        return name
    shipped = {path.stem: path for path in shipped_recipes()}
    if str(name) not in shipped:
        raise UserError(
            f"{given_as}: {shortened(str(name))}: there is no such file in {Path.cwd()}, and lt_train ships {', '.join(shipped)}. "
            "Fix: name a recipe file, or one of these"
        )
    return shipped[str(name)]


def find_recipes(name: Path) -> list[Path]:
    """The recipes of the folder of this name, here or among the shipped recipes ("evidence"); or the one recipe.

    Raises:
        UserError: a folder without recipes.
    """
    folder = name if _exists(name) or name.suffix or len(name.parts) != 1 else _folder() / name
    if not folder.is_dir():
        return [name]
    if not (found := sorted(folder.glob("*.yaml"))):
        raise UserError(f"RECIPE: {shortened(str(name))}: a folder without recipes (*.yaml). Fix: name one that holds some")
    return found


@dataclass(frozen=True)
class RecipeHeader:
    """The comment at the head of a recipe.

    Attributes:
        subject: what it is about, up to the first colon.
        time: on that hardware: of training, where it was planned; of all, where it was measured; empty where neither was.
    """

    subject: str
    hardware: str
    time: str


def read_header(recipe: Path) -> RecipeHeader:
    lines = [
        line for line in recipe.read_text(encoding="utf-8").split("\nname:")[0].splitlines() if "yaml-language-server" not in line
    ]
    text = " ".join(line.removeprefix("#").strip() for line in lines).strip()
    hardware = HARDWARE.search(text)
    return RecipeHeader(text.split(": ")[0], *(hardware.groups(default="") if hardware else ("", "")))


def locate_files(values: Any, recipe: Path) -> Any:
    """The values of a recipe, in which each relative path that the working directory lacks is taken from the recipe's folder.

    A recipe in a folder `recipes`, or in a folder there, may also count from the one that holds `recipes`: there `data/` and
    `launch/` are beside it. The DeepSpeed configurations that come with lt_train are found from anywhere, as `launch/zero3.json`.
    """
    folder = recipe.absolute().parent
    above = [around.parent for around in (folder, folder.parent) if around.name == "recipes"]
    places = [folder, *above]

    def located(setting: str, path: str) -> str:
        if _exists(Path(path)):
            return path
        shipped = shipped_recipes()[:1] if setting == "deepspeed" and path.startswith("launch/") else []
        found = (place / path for place in (*places, *(recipe.parents[1] for recipe in shipped)))
        return next((str(place) for place in found if _exists(place)), path)

    return _with_paths(values, located)


def absolute_files(values: Any) -> Any:
    """The values of a recipe, in which each path that exists is absolute: for a recipe in another folder."""
    return _with_paths(values, lambda _, path: str(Path(path).absolute()) if _exists(Path(path)) else path)


@cache
def _path_settings() -> frozenset[str]:
    return frozenset(names_marked(Recipe, PATH))


def _with_paths(value: Any, change: Callable[[str, str], str], setting: Any = None) -> Any:
    """`change` gets the name and the value of each setting that holds a path."""
    if isinstance(value, dict):
        return {name: _with_paths(inner, change, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_paths(inner, change, setting) for inner in value]
    return change(setting, value) if setting in _path_settings() and isinstance(value, str) and value else value


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, no such user: no path at all
        return False
