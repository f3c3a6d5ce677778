"""vLLM's own environment, by its python, which LT_TRAIN_VLLM_PYTHON names. The scripts that run there are in in_vllm/."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import REPOSITORY

SCRIPTS = REPOSITORY / "tests/support/in_vllm"
MODEL = REPOSITORY / "data/tiny-reasoner"


def python_of_vllm() -> str:
    """Skips the test where there is none."""
    python = os.environ.get("LT_TRAIN_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM needs an environment of its own: set LT_TRAIN_VLLM_PYTHON to its python (launch/serve-vllm.sh says how)")
    return python


def printed(*command: Path | str) -> list[float]:
    """The numbers of a script's last line."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([python_of_vllm(), *command], env=environment, cwd=SCRIPTS, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    return [float(number) for number in ran.stdout.splitlines()[-1].split()]
