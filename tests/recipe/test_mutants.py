"""Whatever is wrong with a recipe or an override: a valid recipe, or one bounded message that names the settings."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest

from lt_train.recipe.loading import MOST_FAULTS, load_recipe_and_remarks
from lt_train.runtime.errors import UserError
from tests.support.recipe_mutants import EVERY_PART, mutants, overrides, recipes, written
from tests.support.repository import REPOSITORY

LONGEST_LINE = 1000

FAULT = re.compile(r"  \S.*?: \S.*")
"""`settings: value: problem. Fix: action (line 3)`."""

OF_THE_WHOLE_FILE = re.compile(
    r"  (the file (is empty|holds a \w+)\. Fix: .+|nested too deeply|more than 10,000 values, counting those that aliases repeat"
    r"|… and [\d,]+ more)"
)


def faults_in_form(path: Path, sets: Iterable[str] = ()) -> int:
    """The number of lines in the message about a recipe; 0: it is valid."""
    try:
        load_recipe_and_remarks(path, list(sets))
    except UserError as error:
        first, *lines = str(error).split("\n")
    else:
        return 0
    if not lines:
        assert first.startswith(f"recipe {path}: not UTF-8 text (")
    else:
        assert first == f"{path}: not a valid recipe"
    assert len(lines) <= MOST_FAULTS + 1
    for line in (first, *lines):
        assert len(line) < LONGEST_LINE and line.isprintable(), ascii(line)
        line.encode()
    for line in lines:
        assert FAULT.fullmatch(line) or OF_THE_WHOLE_FILE.fullmatch(line), line
    return len(lines) or 1


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # relative paths of the recipes count from there


def test_the_recipes_that_are_mutated_are_valid(tmp_path: Path) -> None:
    assert [faults_in_form(written(tmp_path, text.encode())) for text in recipes()] == [0] * len(recipes())


@pytest.mark.slow
def test_hundreds_of_faulty_recipes_are_valid_or_refused_in_one_form(tmp_path: Path) -> None:
    """5 ms of CPU each, most of it PyYAML's; the import of TRL and PEFT takes some seconds more."""
    found = [faults_in_form(written(tmp_path, text)) for text in islice(mutants(seed=22), 500)]
    assert sum(count > 0 for count in found) > 450, "most of them are faulty"


@pytest.mark.slow
def test_faulty_overrides_are_valid_or_refused_in_one_form(tmp_path: Path) -> None:
    path = written(tmp_path, EVERY_PART.encode())
    found = [faults_in_form(path, [override]) for override in islice(overrides(seed=22), 150)]
    assert sum(count > 0 for count in found) > 135


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("[" * 700, "nested too deeply"),
        (f"name: [{'1, ' * 11_000}1]", "more than 10,000 values"),
        ("\n".join(f"k{at}: 1" for at in range(300)), "… and 25"),
        ('name: "\\ud800"\nmodel: x', r"name: '\ud800': half of a character (a lone surrogate). Fix: remove it (line 1)"),
        ('"\\ud800": 1\nmodel: x', r"'\ud800': half of a character (a lone surrogate)"),
        ("data: {limit: 2024-13-45}", "data.limit: '2024-13-45': month must be in 1..12. Fix: put it in quotes (line 1)"),
        ("name: mine\nlimit: 4", "limit: unknown setting here; did you mean data.limit? (line 2)"),
        (f"name: {'x' * 5000}", f"name: '{'x' * 27}..."),
        (f"model: {{base: {'x' * 97}}}", "there is no folder"),
    ],
)
def test_what_no_recipe_can_hold_is_refused_in_the_same_form(tmp_path: Path, text: str, reported: str) -> None:
    path = written(tmp_path, text.encode())
    assert faults_in_form(path) > 0
    with pytest.raises(UserError) as error:
        load_recipe_and_remarks(path)
    assert reported in str(error.value)


def test_a_name_that_an_override_repeats_from_a_faulty_benchmark_is_reported_once(tmp_path: Path) -> None:
    assert faults_in_form(written(tmp_path, EVERY_PART.encode()), ["sample.benchmark==auto"]) == 1


@pytest.mark.parametrize(
    ("name", "reported"),
    [("x" * 5000, "there is no such file in"), (f"{'x' * 5000}.yaml", "File name too long")],
    ids=["bare", "yaml"],
)
def test_a_recipe_with_a_very_long_name_is_refused_in_one_short_line(name: str, reported: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe_and_remarks(Path(name))
    assert reported in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < LONGEST_LINE
