"""Training in processes of its own: killed at any moment, and under DeepSpeed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from test_resume import assert_same_course, steps
from transformers import Qwen3ForCausalLM

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(tiny_training.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def start(folder: Path, settings: dict[str, Any], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(settings)]
    with open(output, "ab") as file:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_goes_on_to_the_same_losses(train_tiny, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": None, "epochs": 15, "save_steps": 2}, "data": {"heldout": 3}}
    train_tiny("whole", **settings)
    output = tmp_path / "output.txt"
    moments, logged = random.Random(5), 0
    for _ in range(2):
        process = start(tmp_path / "killed", settings, output)
        while process.poll() is None and len(steps(tmp_path / "killed")) < logged + 10:
            time.sleep(0.01)  # a kill before the first new step would only interrupt the import of torch
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, output.read_text()
        logged = len(steps(tmp_path / "killed"))
    code = start(tmp_path / "killed", settings, output).wait()
    assert code == 0, output.read_text()
    assert "goes on from checkpoint-" in output.read_text()
    assert_same_course(tmp_path / "killed", tmp_path / "whole")
    whole, killed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] - killed[name]).abs().max() < 1e-6 for name in whole)


def deepspeed(folder: Path, settings: dict[str, Any], base: Path) -> str:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29617"]
    command = [*launcher, str(SCRIPT), str(folder), json.dumps(settings), "--base", str(base)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_zero3_a_distilled_training_has_the_course_of_one_process(tmp_path: Path, method: str) -> None:
    """LoRA's teacher is the sharded base itself; full fine-tuning reads its own from disk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_training.tiny_config()
        config.initializer_range, config.tie_word_embeddings = 0.25, False
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    load = tiny_training.hybrid_from(tmp_path / "base")
    train: dict[str, Any] = {"method": method, "learning_rate": 3e-3, "max_steps": 4, "batch_size": 4, "micro_batch_size": 1}
    settings: dict[str, Any] = {"train": train}
    if method == "lora":
        train["distill"] = {"weight": 0.7, "temperature": 1.5, "hidden_weight": 0.3}
        settings["lora"] = {"rank": 4}
    else:
        train["distill"] = {"weight": 0.7, "temperature": 1.5, "teacher": "top_k", "top_k": 10}
        tiny_training.write_teacher(settings, tmp_path / "teacher", load)
    zero3 = {**train, "deepspeed": str(REPOSITORY / "launch" / "zero3.json")}
    deepspeed(tmp_path / "two", {**settings, "train": zero3}, base=tmp_path / "base")
    tiny_training.train_in(tmp_path / "one", settings, tiny_training.NoTracker(), load=load)
    assert_same_course(tmp_path / "two", tmp_path / "one", tolerance=1e-3, but=["token_accuracy"])
    for column in ("kl", "sft_loss"):
        both = [[row[column] for row in steps(tmp_path / name)] for name in ("two", "one")]
        assert both[0] == pytest.approx(both[1], abs=1e-3) and both[1][0] > 0.01, column
