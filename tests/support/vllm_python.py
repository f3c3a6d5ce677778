"""vLLM's own environment, by its python, which LT_TRAIN_VLLM_PYTHON names. The scripts that run there are in in_vllm/."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

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

    An engine in them computes in the process itself.
    """

    def __init__(self, forking: "subprocess.Popen[str]") -> None:
        self._forking = forking

    def run(
        self, command: Sequence[Path | str], *, env: Mapping[str, str] = os.environ, cwd: Path | str = SCRIPTS, **pipes: Any
    ) -> "subprocess.CompletedProcess[str]":
        """As `subprocess.run` with vLLM's python, text and both outputs captured."""
        python, *rest = map(str, command)
        assert python == python_of_vllm() and self._forking.stdin and self._forking.stdout
        with TemporaryDirectory() as scratch:
            outputs = {name: str(Path(scratch, name)) for name in ("stdout", "stderr")}
            environment = {**env, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            order = {"command": rest, "environment": environment, "folder": str(cwd), **outputs}
            print(json.dumps(order), file=self._forking.stdin, flush=True)
            code = self._forking.stdout.readline()
            assert code, "vLLM's python has ended; its reason is on stderr"
            return subprocess.CompletedProcess(command, int(code), *(Path(path).read_text() for path in outputs.values()))

    def printed(self, *command: Path | str) -> list[float]:
        """The numbers of a script's last line."""
        ran = self.run([python_of_vllm(), *command])
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
        return [float(number) for number in ran.stdout.splitlines()[-1].split()]


@contextmanager
def forked_vllm() -> Iterator[ForkedVllm]:
    environment = os.environ | ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}
    command, pipes = [python_of_vllm(), SCRIPTS / "forked.py"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as forking:
        yield ForkedVllm(forking)
        assert forking.stdin
        forking.stdin.close()
