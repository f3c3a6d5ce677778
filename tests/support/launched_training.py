"""Tiny trainings by two processes."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support import tiny_training
from tests.support.processes import call_in_ranks, free_port
from tests.support.repository import ENVIRONMENT, REPOSITORY

SCRIPT = Path(tiny_training.__file__)


def start_launch(trainings: dict[Path, dict[str, Any]], base: Path, output: Path, *, examples: int = 22) -> subprocess.Popen[bytes]:
    """DeepSpeed's launcher, whose processes train in each folder with its settings, one after the other."""
    given = [text for folder, settings in trainings.items() for text in (str(folder), json.dumps(settings))]
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), str(SCRIPT), *given]
    with open(output, "wb") as file:
        command += ["--base", str(base), "--examples", str(examples)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)


def train_in_ranks(trainings: dict[Path, dict[str, Any]], base: Path, outputs: Path, examples: int = 22) -> str:
    """Train in each folder, without a launcher; returns what the first process printed."""
    ended = call_in_ranks(tiny_training.train_each, trainings, base, examples, outputs=outputs)
    assert [code for code, _ in ended] == [0, 0], ended
    return ended[0][1]


def deepspeed_file(name: str, folder: Path) -> Path:
    """A file of launch/, but with torch's AdamW where DeepSpeed would compile one for CPUs, which takes minutes."""
    settings = json.loads((REPOSITORY / "launch" / name).read_text())
    path = folder / name
    path.write_text(json.dumps({**settings, "zero_force_ds_cpu_optimizer": False}))
    return path
