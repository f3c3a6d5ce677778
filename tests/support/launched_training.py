"""Tiny trainings by several processes, as DeepSpeed's launcher starts them."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.support import tiny_training
from tests.support.repository import ENVIRONMENT

SCRIPT = Path(tiny_training.__file__)


def start_launch(
    trainings: dict[Path, dict[str, Any]], base: Path, output: Path, *, processes: int = 2, examples: int = 22
) -> subprocess.Popen[bytes]:
    """One launch that trains in each folder with its settings, one after the other."""
    given = [text for folder, settings in trainings.items() for text in (str(folder), json.dumps(settings))]
    command = ["deepspeed", "--num_accelerators", str(processes), "--master_port", str(free_port()), str(SCRIPT), *given]
    with open(output, "wb") as file:
        command += ["--base", str(base), "--examples", str(examples)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)


def train_in_two_processes(trainings: dict[Path, dict[str, Any]], base: Path) -> None:
    """As `start_launch`; returns when all are trained."""
    output = base.with_name("launch.txt")
    assert start_launch(trainings, base, output).wait(timeout=540) == 0, output.read_text()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
