"""Recipes that come with lt_train: found by name from any folder, with the files that they name."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lt_train.recipe.loading import load_recipe
from lt_train.recipe.shipped import find_recipes, locate_files, read_header, shipped_recipes
from lt_train.runtime.errors import UserError
from tests.support.repository import REPOSITORY


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_bare_name_is_a_shipped_recipe_and_its_files_are_found_from_any_folder():
    recipe = load_recipe(Path("quickstart"))
    assert recipe.model.base == str(REPOSITORY / "data/tiny-reasoner")
    assert recipe.data.source == str(REPOSITORY / "data/ledger/train.jsonl")


def test_a_file_of_the_working_directory_comes_first(tmp_path):
    (tmp_path / "data/ledger").mkdir(parents=True)
    (tmp_path / "data/ledger/train.jsonl").write_text("{}\n")
    recipe = load_recipe(Path("quickstart"))
    assert recipe.data.source == "data/ledger/train.jsonl"
    assert recipe.model.base == str(REPOSITORY / "data/tiny-reasoner")


def test_paths_also_count_from_the_folder_of_the_recipe(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "traces.jsonl").touch()
    values = {"model": {"base": "owner/name"}, "data": {"source": "traces.jsonl"}, "eval": [{"path": "traces.jsonl"}]}
    located = locate_files(values, project / "mine.yaml")
    found = str(project / "traces.jsonl")
    assert located == {"model": {"base": "owner/name"}, "data": {"source": found}, "eval": [{"path": found}]}


def test_the_deepspeed_configurations_are_found_from_any_folder(tmp_path):
    values = {"train": {"deepspeed": "launch/zero3.json"}, "data": {"source": "launch/zero3.json"}}
    located = locate_files(values, tmp_path / "mine.yaml")
    assert located["train"]["deepspeed"] == str(REPOSITORY / "launch/zero3.json")
    assert located["data"]["source"] == "launch/zero3.json", "nothing else is"


def test_a_name_that_is_neither_file_nor_recipe_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"quikstart: there is no such file in .*ships .*quickstart"):
        load_recipe(Path("quikstart"))


def test_the_command_lists_every_recipe_in_a_line_of_80_columns_with_its_hardware_and_time(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = lt_train("recipes")
    lines = [line.rstrip() for line in out.splitlines()[2:]]
    assert code == 0 and len(lines) == len(shipped_recipes())
    for path, line in zip(shipped_recipes(), lines, strict=True):
        header = read_header(path)
        assert header.hardware
        assert re.fullmatch(rf"{path.stem} +{header.hardware} +{header.time} +{re.escape(header.subject)}", line)
    assert {read_header(path).time for path in shipped_recipes()} >= {"4 min", "37 min", "7 h"}


def test_a_folder_of_recipes_is_found_by_path_or_as_a_shipped_one(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine: a folder without recipes"):
        find_recipes(Path("mine"))
    for name in ("b.yaml", "a.yaml"):
        (tmp_path / "mine" / name).touch()
    assert find_recipes(Path("mine")) == [Path("mine/a.yaml"), Path("mine/b.yaml")]
    evidence = find_recipes(Path("evidence"))
    assert {path.stem for path in evidence} >= {"ledger-frontier", "smollm2-frontier"}
    assert find_recipes(Path("quickstart")) == [Path("quickstart")]


def test_the_evidence_finds_its_files_from_any_folder():
    recipe = load_recipe(Path("ledger-frontier"))
    assert recipe.model.base == str(REPOSITORY / "data/tiny-reasoner")


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_what_the_quickstart_reads(tmp_path):
    """Built and unpacked as pip would; the recipe is then valid without the repository."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(REPOSITORY / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    prefix = tmp_path / "prefix"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--ignore-installed",
        "--prefix",
        str(prefix),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (packages,) = prefix.glob("lib/python*/site-packages")
    assert "lt_train/py.typed" in zipfile.ZipFile(wheel).namelist()
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    for arguments, expected in (
        (["validate", "quickstart"], "a valid recipe"),
        (["validate", "ledger-frontier"], "a valid recipe"),
        (["recipes"], "smollm2-135m"),
    ):
        command = [sys.executable, "-m", "lt_train", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert (prefix / "share/lt_train/launch/zero3.json").is_file()
