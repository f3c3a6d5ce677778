"""Folders that cannot be used: a file in their place, read-only, another user's. Exit code 2 and one sentence."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jinja2 import FileSystemLoader
from markupsafe import Markup

from tests.support.made_runs import made_run
from tests.support.repository import REPOSITORY
from tests.support.tiny_run import write_inputs

Command = Callable[..., tuple[int, str, str]]

NOBODY = 65534

STAGES = ("run", "profile", "convert", "teacher", "train", "eval", "sample", "export")
"""Commands that work in a run folder."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def another_user(*places: Path) -> Iterator[None]:
    """As a user who may read these places, and write to none of them; root becomes nobody."""
    import lt_train.pipeline.run  # noqa: F401 — the code itself may lie where only this user reads

    modes = {place: place.stat().st_mode for place in places}
    for place, mode in modes.items():
        place.chmod(mode & 0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for place, mode in modes.items():
            place.chmod(mode)


def copied(recipe: Path, folder: Path) -> Path:
    """The recipe with its base and data in a folder that every user can read."""
    base = Path(shutil.copytree(REPOSITORY / "data/tiny-reasoner", folder / "base"))
    for name in ("traces.jsonl", "problems.jsonl"):
        shutil.copy(recipe.parent / name, folder)
    text = recipe.read_text().replace(str(recipe.parent), str(folder)).replace(str(REPOSITORY / "data/tiny-reasoner"), str(base))
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def reported(result: tuple[int, str, str]) -> str:
    """The one sentence that a command leaves."""
    code, out, err = result
    assert code == 2, out + err
    assert err.startswith("error ") and err.count("\n") == 1 and "Traceback" not in out, err
    assert len(err) < 1000
    return err


@pytest.mark.parametrize("command", STAGES)
def test_a_file_in_the_place_of_the_runs_is_reported_in_one_sentence(lt_train: Command, recipe: Path, command: str) -> None:
    for runs in (recipe, recipe / "below"):
        assert "error --runs: " in (sentence := reported(lt_train(command, recipe, "--runs", runs)))
        assert "Not a directory, so the run's folder tiny cannot be made or written to. Fix: name a folder" in sentence


@pytest.mark.parametrize("runs", ["/proc/runs", "/dev/null/runs", "/tmp/" + "x" * 300, "/tmp/" + "x/" * 4000])
def test_a_place_that_takes_no_folder_from_any_user_is_reported_in_one_sentence(lt_train: Command, recipe: Path, runs: str) -> None:
    assert "error --runs: " in reported(lt_train("convert", recipe, "--runs", runs))


def test_a_file_in_the_place_of_the_run_or_of_its_lock_is_reported_in_one_sentence(
    lt_train: Command, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny").write_text("a file")
    assert "tiny: File exists, so" in reported(lt_train("convert", recipe, "--runs", tmp_path))
    (tmp_path / "tiny").unlink()
    (tmp_path / "tiny/.lock").mkdir(parents=True)
    assert ".lock: Is a directory, so" in reported(lt_train("convert", recipe, "--runs", tmp_path))


@pytest.mark.parametrize("command", STAGES)
def test_a_read_only_place_is_reported_in_one_sentence(lt_train: Command, recipe: Path, shared: Path, command: str) -> None:
    readable, runs = copied(recipe, shared / "inputs"), shared / "runs"
    runs.mkdir()
    with another_user(runs):
        assert "runs/tiny: Permission denied, so" in reported(lt_train(command, readable, "--runs", runs))
    (runs / "tiny").mkdir()
    with another_user(runs, runs / "tiny"):
        assert "runs/tiny/.lock: Permission denied, so" in reported(lt_train(command, readable, "--runs", runs))


def test_a_run_of_another_user_can_be_shown_and_reported_but_not_worked_in(
    lt_train: Command, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(shared, "mine")
    assert lt_train("report", run, "--out", tmp_path / "page.html")[0] == 0  # imports what the other user may not read
    templates = Path(shutil.copytree(REPOSITORY / "lt_train/report/templates", shared / "templates"))
    monkeypatch.setattr("lt_train.report.page.PackageLoader", lambda *_: FileSystemLoader(templates))
    monkeypatch.setattr("lt_train.report.page.asset", lambda name: Markup((templates / name).read_text(encoding="utf-8")))
    with another_user(shared, run):
        code, out, err = lt_train("show", run)
        assert (code, err) == (0, "") and "ledger" in out
        sentence = reported(lt_train("report", run, "--out", run / "page.html"))
        assert sentence.startswith(f"error --out: {run}/page.html: the report cannot be written: Permission denied")


@pytest.mark.parametrize("closed", [".", "recipe.yaml", "eval"])
def test_a_run_that_this_user_may_not_read_is_reported_in_one_sentence(lt_train: Command, shared: Path, closed: str) -> None:
    run = made_run(shared, "mine")
    mode = (run / closed).stat().st_mode
    (run / closed).chmod(0)
    try:
        with another_user():
            for command in ("show", "report"):
                assert "Permission denied" in reported(lt_train(command, run))
    finally:
        (run / closed).chmod(mode)


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_recipe_a_base_or_data_that_this_user_may_not_read_is_reported_in_one_sentence(
    lt_train: Command, recipe: Path, shared: Path, command: str
) -> None:
    closed = copied(recipe, shared / "closed").parent
    shutil.copy(closed / "recipe.yaml", shared / "open.yaml")
    closed.chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        with another_user():
            reported(lt_train(command, closed / "recipe.yaml"))
            code, _, err = lt_train(command, shared / "open.yaml")
            assert code == 2 and "Traceback" not in err and "closed/traces.jsonl" in err
    finally:
        closed.chmod(0o700)


def test_a_file_in_the_place_of_a_stage_is_reported_in_one_sentence(lt_train: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/hybrid").symlink_to("hybrid")
    arguments = ("convert", recipe, "--runs", tmp_path / "runs", "--set", "hybrid.strategy=periodic")
    assert "hybrid: " in reported(lt_train(*arguments)).splitlines()[-1]
