"""A training that is killed again and again loses nothing of what it tracked."""

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.run_paths import RunPaths
from lt_train.training.log import read_log
from tests.support.processes import exit_code, start
from tests.support.runs import run_in_folder
from tests.support.tiny_run import write_inputs
from tests.support.tracked import tensorboard_curves, tensorboard_pictures, tensorboard_texts
from tests.support.wandb_files import history, run_ids

STEPS = 18
SHORT = [f"train.max_steps={STEPS}", "train.save_steps=4", "eval=[{benchmark: heldout_loss, batch_size: 4}]"]
SHORT += ["track.wandb=offline", "track.tensorboard=true"]


@pytest.mark.slow
def test_each_tracker_has_each_step_and_the_picture_once_after_kills_at_any_moment(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    recipe, moment = load_recipe(tmp_path / "recipe.yaml", SHORT), random.Random(5)
    run = RunPaths(tmp_path / "runs" / recipe.name)
    for number in range(2):
        process = start_evaluation(recipe, tmp_path)
        until(has_logged, run, logged(run) + moment.randrange(1, 7))
        time.sleep(moment.random() / 2)
        kill(process, with_wandb=number % 2 == 0)
    process = start_evaluation(recipe, tmp_path)
    until(run.marker("train").exists)
    kill(process, with_wandb=True)
    assert exit_code(start_evaluation(recipe, tmp_path)) == 0, (tmp_path / "output.txt").read_text()

    segments = sorted(run.root.glob("wandb/offline-run-*/run-*.wandb"))
    rows = [row for segment in segments for row in history(segment)]
    in_wandb = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    logged_losses = {row["step"]: row["loss"] for row in read_log(run.training_log) if "loss" in row}
    for tracked in (in_wandb, tensorboard_curves(run.root)["train/loss"]):
        assert [step for step, _ in tracked] == list(range(1, STEPS + 1))
        assert dict(tracked) == pytest.approx(logged_losses, abs=1e-5)
    assert tensorboard_pictures(run.root) == {"layer profile": 1}
    assert [len(texts) for texts in tensorboard_texts(run.root).values()] == [1, 1, 1]
    assert len([row for row in rows if "layer profile/path" in row]) == 1
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    assert len(set.union(*map(run_ids, segments))) == 1


def start_evaluation(recipe: Recipe, folder: Path) -> ForkServerProcess:
    """`lt-train eval` with all that it needs."""
    return start(run_in_folder, recipe, folder / "runs", "eval", output=folder / "output.txt")


def kill(process: ForkServerProcess, with_wandb: bool) -> None:
    """SIGKILL, as the kernel sends it to a process, or to all of a container, for want of memory."""
    assert process.pid is not None
    for child in psutil.Process(process.pid).children(recursive=True) if with_wandb and process.is_alive() else ():
        child.kill()
    process.kill()
    assert exit_code(process) == -signal.SIGKILL


def logged(run: RunPaths) -> int:
    """Rows in the log, of steps that a resumed training takes again too."""
    return run.training_log.read_text().count('"loss"') if run.training_log.exists() else 0


def has_logged(run: RunPaths, rows: int) -> bool:
    return logged(run) >= rows


def until(happened: Callable[..., bool], *arguments: object) -> None:
    deadline = time.monotonic() + 240
    while not happened(*arguments):
        assert time.monotonic() < deadline
        time.sleep(0.01)
