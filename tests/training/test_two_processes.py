"""What two processes that train together do when one of them meets NaN, and while a checkpoint is probed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_broken_training import BAD

REPOSITORY = Path(__file__).parents[2]
NAN = """
import sys
from pathlib import Path
from test_broken_training import BAD, EVERY_STEP, breaks_on
from tiny_training import train_in
from lt_train.errors import UserError
from lt_train.tracking import NoTracker

try:
    train_in(Path(sys.argv[1]), {"train": {**EVERY_STEP["train"], "micro_batch_size": 1}}, NoTracker(), load=breaks_on(BAD))
except UserError as error:
    print(error)
    sys.exit(2)
"""
PROBES = """
import sys
from pathlib import Path
from test_probes import Training

training = Training(Path(sys.argv[1]))
training.seconds = 2.0
print(training(max_steps=4).steps, training.started)
"""


def in_two_processes(program: str, folder: Path) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_nan_in_one_process_stops_both_with_the_name_of_its_sample(tmp_path: Path) -> None:
    ended = in_two_processes(NAN, tmp_path / "run")
    assert [code for code, _ in ended] == [2, 2], ended
    told = [output.strip().splitlines()[-1] for _, output in ended]
    assert told[0] == told[1] and f": the loss is nan, on {BAD.where}. " in told[0]


@pytest.mark.slow
def test_processes_wait_for_a_probe_together_and_the_first_alone_starts_it(tmp_path: Path) -> None:
    ended = in_two_processes(PROBES, tmp_path / "run")
    assert [code for code, _ in ended] == [0, 0], ended
    assert [output.strip().splitlines()[-1] for _, output in ended] == ["4 [2, 4]", "4 []"]
    for step in (2, 4):
        assert json.loads((tmp_path / f"run/probes/step-{step}/result.json").read_text())["step"] == step
