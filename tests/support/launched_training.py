"""Tiny trainings by two processes."""

import json
from pathlib import Path
from typing import Any

from tests.support import tiny_training
from tests.support.processes import call_in_ranks
from tests.support.repository import REPOSITORY

SCRIPT = Path(tiny_training.__file__)


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
