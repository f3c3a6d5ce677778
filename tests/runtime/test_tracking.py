import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker, Tracker, open_tracker
from tests.support.repository import ENVIRONMENT
from tests.support.wandb_files import history, is_finished, records, run_ids, segments

pytestmark = pytest.mark.usefixtures("wandb_starts_soon")
PROJECT = "tests"


def log_steps(tracker: Tracker, steps: list[int]) -> None:
    for step in steps:
        tracker.log({"train/loss": 1.0 / step}, step=step)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name resolution fails, and there is no login."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("NETRC", "/nonexistent/netrc")


def test_tracking_that_is_off_takes_everything_and_writes_nothing(tmp_path: Path) -> None:
    tracker = open_tracker("off", "lt-train", tmp_path, {})
    assert isinstance(tracker, NoTracker)
    tracker.log({"loss": 1.0}, step=1)
    tracker.image("profile", tmp_path / "none.png")
    tracker.summary({"accuracy": 0.5})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_both_segments_of_a_resumed_run_carry_one_id_and_each_step_once(tmp_path: Path, no_network: None) -> None:
    run_folder = tmp_path / "my-run"
    run_folder.mkdir()
    for steps in ([1, 2, 3, 4, 5], [4, 5, 6, 7]):  # killed after step 5, resumed from the checkpoint of step 3
        tracker = open_tracker("offline", PROJECT, run_folder, {"seed": 1, "train": {"learning_rate": 0.1}})
        log_steps(tracker, steps)
        tracker.summary({"accuracy": 0.5})
        tracker.finish()
    first, second = segments(run_folder)
    assert run_ids(first) == run_ids(second) and len(run_ids(first)) == 1
    rows = history(first) + history(second)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[1]["train/loss"] == 0.5


@pytest.mark.parametrize("kept", [7, 900, 0.3, 0.5, 0.8, 1.0])
def test_what_a_killed_process_had_not_written_out_is_logged_again_once(tmp_path: Path, kept: float, no_network: None) -> None:
    """The file is truncated after `kept` bytes, or that fraction of it, but at the latest within the record of the run's end."""
    picture = tmp_path / "profile.png"
    Image.new("RGB", (4, 4)).save(picture)

    def track(steps: range) -> None:
        tracker = open_tracker("offline", PROJECT, tmp_path, {})
        tracker.image("layer profile", picture)
        for step in steps:
            tracker.log({"train/loss": 1.0 / step}, step=step)
            if step % 10 == 0:
                tracker.log({"train/eval_loss": 2.0 / step}, step=step)
                tracker.log_behind("probes", {"needle": 0.5}, step=step - 5)
        tracker.finish()

    track(range(1, 61))
    (killed,) = segments(tmp_path)
    written = killed.read_bytes()
    length = int(kept * len(written)) if isinstance(kept, float) else kept
    killed.write_bytes(written[:length])
    while is_finished(killed):
        length -= 10
        killed.write_bytes(written[:length])
    track(range(1, 71))
    rows = [row for segment in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) for row in history(segment)]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 71))
    assert [row["step"] for row in rows if "train/eval_loss" in row] == list(range(10, 71, 10))
    assert [row["probes/step"] for row in rows if "probes/needle" in row] == list(range(5, 66, 10))
    assert len([row for row in rows if "layer profile/path" in row]) == 1
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})


def test_a_point_of_a_step_that_was_half_tracked_is_logged_with_that_step(tmp_path: Path, no_network: None) -> None:
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2])
    tracker.finish()  # stopped before the evaluation of step 2
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2])
    tracker.log({"train/eval_loss": 0.25}, step=2)
    log_steps(tracker, [3, 4])
    tracker.finish()
    rows = [row for segment in segments(tmp_path) for row in history(segment)]
    assert [(row["step"], row.get("train/loss"), row.get("train/eval_loss")) for row in rows] == [
        (1, 1.0, None), (2, 0.5, None), (2, None, 0.25), (3, pytest.approx(1 / 3), None), (4, 0.25, None)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:track.wandb")
def test_a_run_outlives_wandbs_own_process_and_what_was_lost_with_it_is_logged_again(tmp_path: Path, no_network: None) -> None:
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3])
    (wandbs_own,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    wandbs_own.terminate()  # as SLURM does, which sends SIGTERM to all processes of a job
    wandbs_own.wait()
    log_steps(tracker, [4, 5])
    tracker.log_behind("probes", {"needle": 0.5}, step=2)
    tracker.table("results", ["model"], [["base"]])
    tracker.summary({"accuracy": 0.5})
    assert not tracker.finish()
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3, 4, 5, 6])
    assert tracker.finish()
    rows = [row for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) for row in history(path)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_finished_tracker_has_written_out_all_and_its_folders_may_be_cleaned(tmp_path: Path, no_network: None) -> None:
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3])
    tracker.finish()
    (segment,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert is_finished(segment)
    shutil.rmtree(tmp_path / "wandb")  # as `wandb clean` does after `wandb sync`
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [2, 3, 4])
    tracker.finish()
    (segment,) = segments(tmp_path)
    assert [row["step"] for row in history(segment)] == [4]


def test_a_state_whose_last_line_was_truncated_resumes_with_the_id_and_step_before_it(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "tracking.jsonl").write_text('{"run_id": "abcd1234"}\n{"saved_step": 2}\n{"saved_st')
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3])
    tracker.finish()
    (segment,) = segments(tmp_path)
    assert run_ids(segment) == {"abcd1234"}
    assert [row["step"] for row in history(segment)] == [3]


@pytest.mark.parametrize("line", ['{"saved_st', "[]", "\x00\x00"])
def test_a_damaged_line_of_the_state_is_an_error_with_its_place_and_nothing_is_tracked(tmp_path: Path, line: str) -> None:
    state = f'{{"run_id": "abcd1234"}}\n{line}\n{{"saved_step": 2}}\n'
    (tmp_path / "tracking.jsonl").write_text(state)
    with pytest.raises(UserError, match=r"tracking\.jsonl:2: "):
        open_tracker("offline", PROJECT, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["tracking.jsonl"]
    assert (tmp_path / "tracking.jsonl").read_text() == state


def test_config_curves_picture_and_scores_reach_the_run(tmp_path: Path, no_network: None) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "profile.png")
    tracker = open_tracker("offline", PROJECT, tmp_path, {"hybrid": {"w_sink": 4}})
    tracker.image("layer profile", tmp_path / "profile.png")
    tracker.image("layer profile", tmp_path / "profile.png")
    tracker.log({"train/loss": 2.0, "train/tokens_per_second": 90.0}, step=1)
    tracker.log({"train/eval_loss": 1.5}, step=1)
    tracker.table("results/ledger", ["model", "right"], [["base", 0.97]])
    tracker.summary({"ledger/accuracy": 0.97})
    tracker.finish()
    (segment,) = segments(tmp_path)
    everything = " ".join(str(r) for r in records(segment))
    assert "w_sink" in everything and "ledger/accuracy" in everything
    rows = history(segment)
    assert next(row for row in rows if "train/loss" in row)["train/eval_loss"] == 1.5
    assert len([row for row in rows if "layer profile/path" in row]) == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json")
    assert json.loads(table.read_text())["data"] == [["base", 0.97]]


def test_points_that_come_late_have_an_axis_of_their_own_and_leave_the_other_curves_alone(tmp_path: Path, no_network: None) -> None:
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3])
    tracker.log_behind("probes", {"needle": 0.25}, step=1)
    log_steps(tracker, [4])
    tracker.log_behind("probes", {"needle": 0.5}, step=4)
    tracker.finish()
    (segment,) = segments(tmp_path)
    rows = history(segment)
    assert [(row["probes/step"], row["probes/needle"]) for row in rows if "probes/needle" in row] == [(1, 0.25), (4, 0.5)]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    metrics = [r.metric for r in records(segment) if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "probes/*" and metric.step_metric == "probes/step" for metric in metrics)


def test_two_points_of_a_curve_that_come_in_one_step_are_both_there(tmp_path: Path, no_network: None) -> None:
    tracker = open_tracker("offline", PROJECT, tmp_path, {})
    log_steps(tracker, [1, 2, 3])
    for step in (1, 2, 3):
        tracker.log_behind("probes", {"needle": step / 4}, step=step)
    log_steps(tracker, [4])
    tracker.finish()
    (segment,) = segments(tmp_path)
    rows = history(segment)
    points = [(row["probes/step"], row["probes/needle"]) for row in rows if "probes/needle" in row]
    assert points == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]


def test_online_without_a_login_is_an_error_with_the_fix(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UserError, match=r"track\.wandb: online: wandb cannot start.*wandb login.*offline or off"):
        open_tracker("online", "lt-train", tmp_path, {})


def test_importing_tracking_imports_no_tracker() -> None:
    code = "import sys, lt_train.runtime.tracking; print({'wandb', 'tensorboard', 'trackio', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT).stdout == "set()\n"
