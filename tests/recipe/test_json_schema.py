"""The JSON Schema that editors read says what the recipes' own schema says."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from lt_train.recipe.json_schema import json_schema
from lt_train.recipe.part import MARKERS
from lt_train.recipe.yaml_text import read_recipe_text
from tests.support.repository import REPOSITORY

FOLDER = REPOSITORY / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
OFF_IS_TEXT = re.compile(r"(?<=wandb: )off\b")  # in YAML 1.2, by which editors read; in 1.1 it is false
VALIDATOR = Draft202012Validator(json_schema())


def test_the_file_beside_the_recipes_is_up_to_date():
    written = json.loads((REPOSITORY / "recipes/recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "run: lt-train schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_the_schema_and_is_valid_by_it(path):
    text = path.read_text(encoding="utf-8")
    above = "../" * (len(path.relative_to(FOLDER).parts) - 1)
    assert text.startswith(f"# yaml-language-server: $schema={above}recipe.schema.json\n")
    assert [error.message for error in VALIDATOR.iter_errors(read_recipe_text(OFF_IS_TEXT.sub("'off'", text)).values)] == []


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [("hybrid", "w_recnt", 4), ("hybrid", "lazy_layer_ratio", 2), ("hybrid", "strategy", "best"), ("data", "max_length", "long")],
)
def test_a_mistake_is_marked_in_an_editor(part, setting, value):
    recipe = read_recipe_text(RECIPES[0].read_text(encoding="utf-8")).values
    recipe[part][setting] = value
    assert list(VALIDATOR.iter_errors(recipe))


def test_every_setting_is_explained_and_no_marker_of_ours_is_in_it():
    schema = json_schema()
    for name, part in schema["$defs"].items():
        for setting, given in part.get("properties", {}).items():
            assert not {"title", *MARKERS} & given.keys(), f"{name}.{setting}"
    described = [setting for part in schema["$defs"].values() for setting in part.get("properties", {}).values()]
    assert sum("description" in setting for setting in described) > 0.6 * len(described)
