"""`lt-train train` that is stopped by a signal: what it says, what it keeps, and that the same command resumes."""

import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from lt_train.recipe.loading import load_recipe
from lt_train.training.checkpoints import fault_of
from tests.support.processes import exit_code, start
from tests.support.runs import call_lt_train, run_in_folder
from tests.support.tiny_run import write_inputs
from tests.support.training_log import assert_same_course, steps

STEPS = 12
SETTINGS = [f"train.max_steps={STEPS}", "hybrid.strategy=periodic", "track.wandb=offline"]
SECONDS_UNTIL_SIGKILL = 30  # SLURM's KillWait


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its data, and the run that it makes when nothing stops it."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    run_in_folder(load_recipe(folder / "recipe.yaml", SETTINGS), folder / "unbroken", "train")
    return folder


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_in_time_and_the_same_command_resumes_from_it(inputs: Path, tmp_path: Path) -> None:
    train = tmp_path / "runs/tiny/train"
    process = start_train(inputs, tmp_path)
    wait_for_steps(train, 5)
    signalled = time.monotonic()
    terminate_job(process)
    assert exit_code(process) == 128 + signal.SIGTERM, said(tmp_path)
    assert time.monotonic() - signalled < SECONDS_UNTIL_SIGKILL
    (checkpoint,) = train.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert fault_of(checkpoint) is None and 5 <= step == len(steps(train)) < STEPS
    assert said(tmp_path).splitlines()[-1] == (
        f"stopped by SIGTERM; the checkpoint of step {step} is saved; the same command resumes"
    )
    resumes(inputs, tmp_path)
    assert f'{{"resumed_from": {step}}}' in (train / "log.jsonl").read_text()


@pytest.mark.slow
def test_ctrl_c_reports_that_the_training_stopped_and_the_same_command_resumes_it(inputs: Path, tmp_path: Path) -> None:
    train = tmp_path / "runs/tiny/train"
    process = start_train(inputs, tmp_path, "train.save_steps=3")
    wait_for_steps(train, 5)
    psutil.Process(process.pid).send_signal(signal.SIGINT)  # wandb's process is in a session of its own
    assert exit_code(process) == 128 + signal.SIGINT, said(tmp_path)
    assert said(tmp_path).splitlines()[-1] == "stopped; the same command resumes"
    assert "Traceback" not in said(tmp_path) and len(steps(train)) < STEPS
    resumes(inputs, tmp_path, "train.save_steps=3")


def resumes(inputs: Path, folder: Path, *more: str) -> None:
    """The same command resumes, and the training takes the course of one that nothing stopped."""
    assert exit_code(start_train(inputs, folder, *more)) == 0, said(folder)
    assert_same_course(folder / "runs/tiny/train", inputs / "unbroken/tiny/train")


def start_train(inputs: Path, folder: Path, *more: str) -> ForkServerProcess:
    settings = [f"--set={each}" for each in (*SETTINGS, *more)]
    command = ["train", str(inputs / "recipe.yaml"), "--runs", str(folder / "runs"), *settings]
    return start(call_lt_train, command, output=folder / "output.txt")


def terminate_job(process: ForkServerProcess) -> None:
    """SLURM sends SIGTERM to all processes of a job, so to wandb's too."""
    command = psutil.Process(process.pid)
    for each in (*command.children(recursive=True), command):
        each.terminate()


def wait_for_steps(train: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not ((train / "log.jsonl").exists() and len(steps(train)) >= count):
        assert time.monotonic() < deadline, said(train.parents[2])
        time.sleep(0.02)


def said(folder: Path) -> str:
    return (folder / "output.txt").read_text()
