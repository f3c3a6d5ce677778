"""vLLM's own environment, by its python, which LT_TRAIN_VLLM_PYTHON names. The scripts that run there are in in_vllm/."""

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.launches import WARM_PYTHON
from tests.support.repository import REPOSITORY

SCRIPTS = REPOSITORY / "tests/support/in_vllm"
MODEL = REPOSITORY / "data/tiny-reasoner"
ENVIRONMENT = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}


def python_of_vllm() -> str:
    """Skips the test where there is none."""
    python = os.environ.get("LT_TRAIN_VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM needs an environment of its own: set LT_TRAIN_VLLM_PYTHON to its python (launch/serve-vllm.sh says how)")
    return python


class ForkedVllm:
    """Processes of vLLM's environment, forked from one that has imported vLLM: by itself, each would take ten seconds for it.

    `WARM_PYTHON` with `environment` is vLLM's python. An engine that a script makes computes in the process itself.
    """

    def __init__(self, address: str) -> None:
        self.environment = {**ENVIRONMENT, "LT_TRAIN_WARM_PYTHON": address, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def run(
        self, command: Sequence[Path | str], *, env: Mapping[str, str] = os.environ, cwd: Path | str = SCRIPTS, **pipes: Any
    ) -> "subprocess.CompletedProcess[str]":
        """As `subprocess.run` with vLLM's python, text and both outputs captured."""
        python, *rest = map(str, command)
        assert python == python_of_vllm()
        environment = {**env, **self.environment}
        return subprocess.run([WARM_PYTHON, *rest], env=environment, cwd=cwd, capture_output=True, text=True)

    def printed(self, *command: Path | str) -> list[float]:
        """The numbers of a script's last line."""
        ran = self.run([python_of_vllm(), *command])
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
        return [float(number) for number in ran.stdout.splitlines()[-1].split()]


@contextmanager
def forked_vllm() -> Iterator[ForkedVllm]:
    environment = os.environ | ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR", "WARM_PYTHON": str(WARM_PYTHON)}
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := f"{folder}/socket")
        listener.listen()
        command = [python_of_vllm(), SCRIPTS / "forked.py", str(listener.fileno())]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]) as forking:
            listener.close()  # a client whose server has ended is refused
            yield ForkedVllm(address)
            assert forking.stdin
            forking.stdin.close()
