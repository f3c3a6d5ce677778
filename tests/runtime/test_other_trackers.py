"""TensorBoard's event files and trackio's database, each read back by its own library; and several trackers at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from lt_train.runtime.errors import UserError
from lt_train.runtime.markdown import markdown_table
from lt_train.runtime.tracking import Tracker, open_tracker
from tests.support.repository import ENVIRONMENT
from tests.support.tracked import event_files, tensorboard_curves, tensorboard_pictures, tensorboard_texts, trackio_rows
from tests.support.wandb_files import history, segments


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """trackio with a database of this test's own."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install lt-train[trackio]")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio") and hasattr(module, "MEDIA_DIR")]:
        monkeypatch.setattr(module, "MEDIA_DIR", tmp_path / "trackio/media")
    return sys.modules["trackio"]


class Kind(NamedTuple):
    """One tracker: how it is opened in a run folder, and the curves that it holds then."""

    open: Callable[[Path], Tracker]
    curves: Callable[[Path], dict[str, list[tuple[int, float]]]]


def trackio_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, row in trackio_rows(run, "tests"):
        for name, value in row.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append((step, value))
    return {name: sorted(points) for name, points in found.items()}


@pytest.fixture(params=["tensorboard", "trackio"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "trackio":
        request.getfixturevalue("trackio")
    curves = {"tensorboard": tensorboard_curves, "trackio": trackio_curves}[request.param]
    return Kind(lambda run: open_tracker("off", "tests", run, {"seed": 1}, **{request.param: True}), curves)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "runs/mine").mkdir(parents=True)
    Image.new("RGB", (4, 6), (255, 0, 0)).save(tmp_path / "runs/mine/profile.png")
    return tmp_path / "runs/mine"


def test_a_resumed_run_has_each_point_once_at_its_step(kind: Kind, run: Path) -> None:
    for steps in (range(1, 6), range(4, 8)):  # stopped after step 5, resumed from the checkpoint of step 3
        tracker = kind.open(run)
        for step in steps:
            tracker.log({"train/loss": 1.0 / step, "train/tokens": 8 * step}, step=step)
        tracker.log_behind("probes", {"needle": 0.25}, step=2)  # comes when its step has long passed
        assert tracker.finish()
    curves = kind.curves(run)
    assert curves["train/loss"] == [(step, pytest.approx(1.0 / step)) for step in range(1, 8)]
    assert curves["train/tokens"] == [(step, 8 * step) for step in range(1, 8)]
    assert curves["probes/needle"] == [(2, 0.25)]


def test_a_point_that_comes_in_a_step_that_was_tracked_is_added(kind: Kind, run: Path) -> None:
    for metrics in ({"train/loss": 2.0}, {"train/loss": 2.0, "train/eval_loss": 1.5}):
        tracker = kind.open(run)
        tracker.log(metrics, step=1)
        assert tracker.finish()
    assert kind.curves(run) == {"train/loss": [(1, 2.0)], "train/eval_loss": [(1, 1.5)]}


KILLED = """
import os, signal, sys, time
from pathlib import Path
from lt_train.runtime.tracking import open_tracker
tracker = open_tracker("off", "tests", Path(sys.argv[1]), {}, **{sys.argv[2]: True})
for step in range(1, 41):
    tracker.log({"train/loss": 1.0 / step}, step=step)
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_was_killed_loses_no_point(kind: Kind, run: Path, request: pytest.FixtureRequest) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(run.parents[1] / "trackio")}
    name = request.node.callspec.params["kind"]
    killed = subprocess.run([sys.executable, "-c", KILLED, run, name], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tracker = kind.open(run)
    for step in range(1, 46):
        tracker.log({"train/loss": 1.0 / step}, step=step)
    assert tracker.finish()
    assert kind.curves(run)["train/loss"] == [(step, pytest.approx(1.0 / step)) for step in range(1, 46)]


@pytest.mark.parametrize("kept", [0, 20, 0.3, 0.8, -3])
def test_what_a_killed_process_had_not_written_to_its_event_file_is_logged_again_once(run: Path, kept: float) -> None:
    """The file is truncated after `kept` bytes, or that fraction of it."""

    def track(steps: range) -> None:
        tracker = open_tracker("off", "tests", run, {}, tensorboard=True)
        tracker.image("layer profile", run / "profile.png")
        for step in steps:
            tracker.log({"train/loss": 1.0 / step}, step=step)
        tracker.table("probe scores", ["step", "needle"], [[1, 0.5]])
        assert tracker.finish()

    track(range(1, 31))
    (file,) = event_files(run)
    written = file.read_bytes()
    file.write_bytes(written[: int(kept * len(written)) if isinstance(kept, float) else kept])
    track(range(1, 36))
    assert tensorboard_curves(run)["train/loss"] == [(step, pytest.approx(1.0 / step)) for step in range(1, 36)]
    assert tensorboard_pictures(run) == {"layer profile": 1}
    assert len(tensorboard_texts(run)["probe scores"]) == 1


def test_a_database_that_lost_its_last_rows_gets_them_again(trackio: Any, run: Path) -> None:
    import sqlite3

    for last in (4, 6):
        tracker = open_tracker("off", "tests", run, {}, trackio=True)
        for step in range(1, last + 1):
            tracker.log({"train/loss": 1.0 / step}, step=step)
        assert tracker.finish()
        if last == 4:
            (database,) = run.parents[1].glob("trackio/*.db")
            with sqlite3.connect(database) as connection:
                connection.execute("DELETE FROM metrics WHERE step > 2")
    assert trackio_curves(run)["train/loss"] == [(step, 1.0 / step) for step in range(1, 7)]


def test_two_run_folders_of_one_name_are_two_runs_in_trackio(trackio: Any, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/mine"
    other.mkdir(parents=True)
    for folder in (run, other):
        tracker = open_tracker("off", "tests", folder, {}, trackio=True)
        tracker.log({"train/loss": 1.0}, step=1)
        assert tracker.finish()
    assert trackio_curves(run) == trackio_curves(other) == {"train/loss": [(1, 1.0)]}


def test_tables_and_final_scores_are_text_in_tensorboard_and_the_last_one_is_shown_first(run: Path) -> None:
    for accuracy in (0.5, 0.5, 0.97):
        tracker = open_tracker("off", "tests", run, {"hybrid": {"w_sink": 4}}, tensorboard=True)
        tracker.table("results/ledger", ["model", "right"], [["base", 1.0], ["reach | LoRA", accuracy], ["none", None]])
        tracker.summary({"ledger/accuracy": accuracy})
        tracker.image("layer profile", run / "profile.png")
        assert tracker.finish()
    texts = tensorboard_texts(run)
    assert [step for step, _ in texts["results/ledger"]] == [0, 1]
    assert texts["results/ledger"][-1][1] == (
        "| model | right |\n| --- | --- |\n| base | 1.0 |\n| reach &#124; LoRA | 0.97 |\n| none |  |"
    )
    assert [text.splitlines()[-1] for _, text in texts["summary"]] == ["| ledger/accuracy | 0.5 |", "| ledger/accuracy | 0.97 |"]
    assert len(texts["recipe"]) == 1 and '"w_sink": 4' in texts["recipe"][0][1]
    assert tensorboard_pictures(run) == {"layer profile": 1}


def test_tables_final_scores_and_the_picture_are_in_trackio(trackio: Any, run: Path) -> None:
    for accuracy in (0.5, 0.5, 0.97):
        tracker = open_tracker("off", "tests", run, {"hybrid": {"w_sink": 4}}, trackio=True)
        tracker.table("results/ledger", ["model", "right"], [["base", accuracy]])
        tracker.summary({"ledger/accuracy": accuracy})
        tracker.image("layer profile", run / "profile.png")
        assert tracker.finish()
    found = [(step, name, value) for step, row in trackio_rows(run, "tests") for name, value in row.items()]
    tables = [(step, value["_value"]) for step, name, value in found if name == "results/ledger"]
    assert tables == [(0, [{"model": "base", "right": 0.5}]), (1, [{"model": "base", "right": 0.97}])]
    assert [value["_value"] for _, name, value in found if name == "summary"][-1] == [{"name": "ledger/accuracy", "value": 0.97}]
    assert len([name for _, name, _ in found if name == "layer profile"]) == 1
    assert len(list((run.parents[1] / "trackio/media").rglob("*.png"))) == 1


def test_trackio_on_another_machine_is_refused_as_a_resume_could_not_read_it(trackio: Any, run: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(UserError, match=r"track\.trackio: TRACKIO_SPACE_ID: .* Fix: unset it"):
        open_tracker("off", "tests", run, {}, trackio=True)


def test_several_trackers_get_the_same(run: Path) -> None:
    tracker = open_tracker("offline", "tests", run, {}, tensorboard=True)
    for step in (1, 2):
        tracker.log({"train/loss": 1.0 / step}, step=step)
    tracker.log_behind("probes", {"needle": 0.5}, step=1)
    tracker.image("layer profile", run / "profile.png")
    tracker.table("results", ["model"], [["base"]])
    tracker.summary({"accuracy": 0.5})
    assert tracker.finish()
    (segment,) = segments(run)
    rows = history(segment)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1.0, 0.5]
    assert tensorboard_curves(run) == {"train/loss": [(1, 1.0), (2, 0.5)], "probes/needle": [(1, 0.5)]}
    assert {"results", "summary", "recipe"} == set(tensorboard_texts(run)) and len(
        list(run.glob("wandb/offline-run-*/files/media/images/*"))
    ) == 1


def test_a_tracker_that_cannot_start_ends_the_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr("lt_train.runtime.tensorboard_tracker.TensorBoardTracker.finish", lambda self: closed.append(self))
    monkeypatch.setattr("lt_train.runtime.tracking.WandbTracker", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_tracker("offline", "tests", run, {}, tensorboard=True)
    assert len(closed) == 1


def test_a_cell_of_a_markdown_table_stays_in_its_cell() -> None:
    assert markdown_table(["a"], [["x|y\nz"], [None]]) == "| a |\n| --- |\n| x&#124;y z |\n|  |"
