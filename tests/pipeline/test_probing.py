"""Probes of checkpoints by the real process: what it finds is what an evaluation of the same weights finds."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lt_train import cli
from lt_train.evaluation.scores import read_scores
from lt_train.pipeline.probing import probe_checkpoint
from lt_train.runtime.errors import UserError
from lt_train.training.checkpoints import publish_weights, read_checkpoint
from lt_train.training.probes.results import probe_folder, read_probes
from tests.support import processes
from tests.support.launches import WARM_PYTHON, new_pythons_are_forked
from tests.support.repository import ENVIRONMENT
from tests.support.tiny_run import write_inputs
from tests.support.wandb_files import is_finished

ASKED = {"benchmark": "ledger", "path": "PROBLEMS", "limit": 6, "max_new_tokens": 24, "batch_size": 2}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def settings(inputs: Path, requested: dict[str, Any], **train: Any) -> list[str]:
    entry = json.dumps({**requested, "path": str(inputs / "problems.jsonl")})
    probes = f"train.probes={{steps: 2, evals: [{entry}]}}"
    return ["hybrid.strategy=periodic", f"eval=[{entry}]", probes, *(f"train.{name}={value}" for name, value in train.items())]


def samples(folder: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {row["problem"]: (row["text"], row["prompt_hash"]) for row in rows}


def test_a_probe_of_full_weights_finds_what_an_evaluation_of_them_finds(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, how = inputs / "runs", settings(inputs, ASKED, method="full", learning_rate=1e-4)

    def lt_train(command: str, *overrides: str) -> None:
        arguments = [command, str(inputs / "recipe.yaml"), "--runs", str(runs), *(f"--set={each}" for each in overrides)]
        monkeypatch.setattr(sys, "argv", ["lt-train", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code, capsys.readouterr().err

    lt_train("eval", *how, "train.probes=null")
    lt_train("train", *how)  # probes may come to a run that was begun without them
    run = runs / "tiny"
    with pytest.raises(UserError, match="holds no weights to probe"):
        probe_checkpoint(run, 2)
    publish_weights(read_checkpoint(run / "train/checkpoint-2"), probe_folder(run / "train", 2) / "weights")
    command = [sys.executable, "-m", "lt_train", "probe", str(run), "--step", "2", "--parent", str(os.getpid())]
    done = processes.run(command, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (result,) = read_probes(run / "train")
    (score,) = result.scores
    evaluated = run / "eval/trained/ledger"
    found = read_scores(evaluated / "scores.json")
    assert (score.probe, score.accuracy, score.truncated, score.problems) == ("ledger", found.accuracy, found.truncated, 6)
    there = samples(evaluated)
    assert samples(probe_folder(run / "train", 2) / "evals/ledger") == there
    assert {each.problem: each.answer for each in result.samples} == {problem: text for problem, (text, _) in there.items()}


def until(reached: Callable[[], Any], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_training_killed_in_a_probe_takes_it_with_it_and_finishes_it_on_resume(
    inputs: Path, lt_train: Callable[..., tuple[int, str, str]]
) -> None:
    run = inputs / "runs/tiny"
    how = settings(inputs, {**ASKED, "limit": 3, "max_new_tokens": 120, "batch_size": 1}, max_steps=2, keep_best="ledger")
    arguments = ["train", str(inputs / "recipe.yaml"), "--runs", str(inputs / "runs")]
    arguments += [f"--set={each}" for each in (*how, "track.wandb=offline")]
    forking = f"import sys; sys.executable = {str(WARM_PYTHON)!r}; from lt_train import cli; cli.main()"
    begun = probe_folder(run / "train", 2) / "evals/ledger/samples.jsonl"
    with new_pythons_are_forked() as given:
        # without the wandb service of a test before this one in the same process, in which the killed run would stay open
        own = {name: value for name, value in given.items() if name != "WANDB_SERVICE"}
        environment = {**own, "RANK": "0", "WORLD_SIZE": "1"}  # what a launcher sets is not for the probe
        training = processes.start_python([sys.executable, "-c", forking, *arguments], inputs / "output.txt", env=environment)
        until(lambda: not training.is_alive() or (begun.exists() and begun.read_text().count("\n") > 0), "no probe began")
        assert training.is_alive(), (inputs / "output.txt").read_text()
        (probing,) = [child for child in psutil.Process(training.pid).children() if "probe" in child.cmdline()]
        assert not {"RANK", "WORLD_SIZE"} & probing.environ().keys()
        training.kill()
        assert processes.exit_code(training) == -signal.SIGKILL
        until(lambda: not probing.is_running() or probing.status() == psutil.STATUS_ZOMBIE, "the orphan still runs", seconds=30)
    before = begun.read_bytes()
    assert before and not (probe_folder(run / "train", 2) / "result.json").exists()

    with processes.probes_are_forked():
        code, printed, errors = lt_train(*arguments)
    assert code == 0, printed + errors
    assert begun.read_bytes().startswith(before[: before.rfind(b"\n") + 1]) and len(samples(begun.parent)) == 3
    (result,) = read_probes(run / "train")
    assert result.step == 2 and "probe of step 2: ledger " in printed
    assert (run / "train/best-2/adapter_model.safetensors").exists()
    _, resumed = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert is_finished(resumed)
    tables = [json.loads(path.read_text()) for path in run.glob("wandb/offline-run-*/files/media/table/**/*.table.json")]
    (scores,) = [table["data"] for table in tables if table["columns"][1] == "probe"]
    assert scores == [[2, "ledger", result.scores[0].accuracy, result.scores[0].standard_error, 3, result.scores[0].truncated]]
    (answers,) = [table["data"] for table in tables if table["columns"][1] == "problem"]
    assert [row[1:3] for row in answers] == [[each.problem, each.answer] for each in result.samples]
