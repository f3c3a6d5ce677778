"""What arrives at wandb's server, or rather at one that answers as it does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lt_train.runtime.tracking import open_tracker
from tests.support.wandb_server import WandbServer, serving

pytestmark = pytest.mark.usefixtures("wandb_starts_soon")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
        yield server


def track(run_folder: Path, mode: str, steps: range) -> None:
    tracker = open_tracker(mode, "tests", run_folder, {})
    for step in steps:
        tracker.log({"train/loss": 1.0 / step}, step=step)
    assert tracker.finish()


@pytest.mark.slow
def test_wandb_sync_of_all_parts_of_a_run_gives_the_server_each_step_once(tmp_path: Path, server: WandbServer) -> None:
    for steps in (range(1, 7), range(4, 10), range(8, 12)):
        track(tmp_path, "offline", steps)
    parts = sorted(tmp_path.glob("wandb/offline-run-*"))
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "sync", *parts], env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(parts) == 3, done.stderr
    assert [row["step"] for row in server.history] == list(range(1, 12)), done.stderr


@pytest.mark.slow
def test_what_the_server_did_not_get_before_an_online_run_was_killed_is_sent_by_the_next(
    tmp_path: Path, server: WandbServer
) -> None:
    track(tmp_path, "online", range(1, 9))
    assert [row["step"] for row in server.history] == list(range(1, 9))
    server.rows = {place: row for place, row in server.rows.items() if row["step"] < 6}  # as if the others had been on their way
    track(tmp_path, "online", range(1, 12))
    assert [row["step"] for row in server.history] == list(range(1, 12))
