"""Training in processes of its own: killed at any moment, and distilled by two."""

import json
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tests.support import tiny_training
from tests.support.launched_training import SCRIPT, train_in_ranks
from tests.support.processes import exit_code, start_python
from tests.support.repository import REPOSITORY
from tests.support.training_log import assert_same_course, steps


def start(folder: Path, settings: dict[str, Any], output: Path) -> ForkServerProcess:
    return start_python([sys.executable, str(SCRIPT), str(folder), json.dumps(settings)], output)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_resumes_to_the_same_losses(train_tiny, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": None, "epochs": 3, "save_steps": 2}, "data": {"heldout": 3}}
    train_tiny("uninterrupted", **settings)
    output = tmp_path / "output.txt"
    moments, logged = random.Random(5), 0
    for _ in range(2):
        process = start(tmp_path / "killed", settings, output)
        while process.is_alive() and len(steps(tmp_path / "killed")) < logged + 3:
            time.sleep(0.01)  # a kill before the first new step would only interrupt the loading
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL, output.read_text()
        logged = len(steps(tmp_path / "killed"))
    code = exit_code(start(tmp_path / "killed", settings, output))
    assert code == 0, output.read_text()
    assert "resumed from checkpoint-" in output.read_text()
    assert_same_course(tmp_path / "killed", tmp_path / "uninterrupted")
    uninterrupted, killed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("uninterrupted", "killed"))
    assert all((uninterrupted[name] - killed[name]).abs().max() < 1e-6 for name in uninterrupted)


OWN = {"weight": 0.7, "temperature": 1.5, "hidden_weight": 0.3}
STORED = {"weight": 0.7, "temperature": 1.5, "teacher": "top_k", "top_k": 10}
DISTILLED: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "ddp, lora": (None, "lora", OWN),  # the teacher is the base itself
    "zero2, full": ("zero2.json", "full", OWN),  # a frozen copy of it
    "zero3, lora": ("zero3.json", "lora", OWN),  # the sharded base itself
    "zero3, full": ("zero3.json", "full", STORED),  # read from disk
}


def distilled_settings(mode: str, *, launched: bool) -> dict[str, Any]:
    """3 steps of 4 samples."""
    file, method, distill = DISTILLED[mode]
    train = {"method": method, "learning_rate": 3e-3, "max_steps": 3, "batch_size": 4, "micro_batch_size": 1, "distill": distill}
    if launched and file is not None:
        train["deepspeed"] = str(REPOSITORY / "launch" / file)
    return {"train": train, **({"lora": {"rank": 4}} if method == "lora" else {})}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base, and of one training of each mode by two processes: <mode>/two."""
    folder = tmp_path_factory.mktemp("distilled")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_training.tiny_config()
        config.initializer_range, config.tie_word_embeddings = 0.25, False
        Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    load = tiny_training.hybrid_from(folder / "base")
    trainings = {folder / mode / "two": distilled_settings(mode, launched=True) for mode in DISTILLED}
    for two, settings in trainings.items():
        if settings["train"]["distill"] is STORED:
            tiny_training.write_teacher(settings, two.with_name("teacher"), load)
    train_in_ranks(trainings, folder / "base", folder / "printed")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", DISTILLED)
def test_two_processes_distil_as_one_with_double_accumulation(distilled: Path, mode: str) -> None:
    folder = distilled / mode
    load = tiny_training.hybrid_from(distilled / "base")
    settings = distilled_settings(mode, launched=False)
    tiny_training.train_in(folder / "one", settings, tiny_training.NoTracker(), load=load)
    assert_same_course(folder / "two", folder / "one", tolerance=1e-3, but=["token_accuracy"])
    parts = ["kl", "sft_loss", *(["hidden_difference"] if "hidden_weight" in settings["train"]["distill"] else [])]
    for column in parts:
        both = [[row[column] for row in steps(folder / name)] for name in ("two", "one")]
        assert both[0] == pytest.approx(both[1], abs=1e-3) and both[1][0] > 0.01, column
