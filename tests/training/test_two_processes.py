"""What two processes that train together do when one of them meets NaN, and while a checkpoint is probed."""

import json
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from lt_train.hybrid.loading import load_hybrid_checkpoint
from lt_train.training.checkpoints import fault_of
from lt_train.training.probes.results import read_probes
from tests.support.broken_training import BAD
from tests.support.processes import exit_code, free_port, start_python
from tests.support.repository import ENVIRONMENT, REPOSITORY
from tests.support.tiny_training import tiny_config

NAN = """
import sys
from pathlib import Path
from tests.support.broken_training import BAD, EVERY_STEP, breaks_on
from tests.support.tiny_training import train_in
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker

try:
    train_in(Path(sys.argv[1]), {"train": {**EVERY_STEP["train"], "micro_batch_size": 1}}, NoTracker(), load=breaks_on(BAD))
except UserError as error:
    print(error)
    sys.exit(2)
"""
PROBES = """
import sys
from pathlib import Path
from tests.support.probed_training import Training

training = Training(Path(sys.argv[1]))
training.outlasts_training = True
print(training(max_steps=4).steps, training.started)
"""

PREEMPTED = """
import sys
from pathlib import Path
from tests.support.tiny_training import SignalAt, train_in
from lt_train.runtime.interruption import Interrupted
from lt_train.runtime.processes import leave

try:
    train_in(Path(sys.argv[1]), {"train": {"max_steps": 6, "save_steps": 100}}, SignalAt(3))  # the first process alone logs
except Interrupted as stop:
    print(stop)
    leave(stop.exit_code)
"""
OWN_FOLDERS = """
import os, sys
from pathlib import Path
from tests.support.tiny_training import train_in
from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker

try:
    train_in(Path(sys.argv[1]) / os.environ["RANK"], {}, NoTracker())
except UserError as error:
    print(error)
    sys.exit(2)
"""
IN_A_COLLECTIVE = """
import hashlib, os, sys
from pathlib import Path
from tests.support.tiny_training import load_tiny, train_in
from lt_train.runtime.tracking import NoTracker

def load(dtype):
    model, passes = load_tiny(dtype), []

    def stop_in_the_third_pass(*given):
        passes.append(given)
        if len(passes) == 3:
            if os.environ["RANK"] == "0":
                os._exit(1)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as in a collective, no Python code runs in the main thread

    model.register_forward_hook(stop_in_the_third_pass)
    return model

train_in(Path(sys.argv[1]), {}, NoTracker(), load=load)
"""

ZERO3 = """
import sys
from pathlib import Path
from tests.support.tiny_training import SPEC, hybrid_from, tiny_examples, tiny_recipe, tiny_tokenizer
from lt_train.runtime.tracking import NoTracker
from lt_train.training.probes.results import probe_folder
from lt_train.training.trainer import train

out, zero3, base, probe, copy = map(Path, sys.argv[1:])
settings = {"max_steps": 2, "deepspeed": str(zero3), "probes": {"steps": 2, "evals": [{"benchmark": "needle"}]}}
given = (tiny_recipe({"train": settings}), hybrid_from(base), tiny_tokenizer(), tiny_examples(), SPEC, out, NoTracker())
train(*given, probe_command=lambda step: [sys.executable, str(probe), str(probe_folder(out, step)), str(copy)])
"""
COPIES = """
import json, os, shutil, sys
from pathlib import Path

assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
place, copy = Path(sys.argv[1]), Path(sys.argv[2])
shutil.copytree(place / "weights", copy)
(place / "result.tmp").write_text(json.dumps({"step": 2, "scores": [], "samples": []}))
(place / "result.tmp").rename(place / "result.json")
"""


def start_two_processes(program: str, *arguments: Path, output: Path) -> list[ForkServerProcess]:
    """Each prints into a file of its rank in `output`."""
    output.mkdir()
    shared = {
        **ENVIRONMENT,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return [start_python(command, output / rank, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


def in_two_processes(program: str, *arguments: Path, output: Path) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    processes = start_two_processes(program, *arguments, output=output)
    return [(exit_code(process), (output / str(rank)).read_text()) for rank, process in enumerate(processes)]


@pytest.mark.slow
def test_nan_in_one_process_stops_both_with_the_name_of_its_sample(tmp_path: Path) -> None:
    ended = in_two_processes(NAN, tmp_path / "run", output=tmp_path / "printed")
    assert [code for code, _ in ended] == [2, 2], ended
    last_lines = [output.strip().splitlines()[-1] for _, output in ended]
    assert last_lines[0] == last_lines[1] and f": the loss is nan, on {BAD.where}. " in last_lines[0]


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_are_refused_before_the_first_step(tmp_path: Path) -> None:
    ended = in_two_processes(OWN_FOLDERS, tmp_path / "run", output=tmp_path / "printed")
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("has another folder there than the first process" in output for _, output in ended), ended
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_one_checkpoint_of_both(tmp_path: Path) -> None:
    ended = in_two_processes(PREEMPTED, tmp_path / "run", output=tmp_path / "printed")
    assert [code for code, _ in ended] == [143, 143], ended
    assert [output.strip().splitlines()[-1] for _, output in ended] == ["stopped by SIGTERM; the checkpoint of step 4 is saved"] * 2
    assert fault_of(tmp_path / "run/checkpoint-4") is None


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_in_a_collective_for_one_that_has_ended(tmp_path: Path) -> None:
    first, second = start_two_processes(IN_A_COLLECTIVE, tmp_path / "run", output=tmp_path / "printed")
    try:
        assert exit_code(first, seconds=200) == 1
        second.terminate()
        assert exit_code(second, seconds=10) == 143, (tmp_path / "printed/1").read_text()
    finally:
        second.kill()


@pytest.mark.slow
def test_processes_wait_for_a_probe_together_and_the_first_alone_starts_it(tmp_path: Path) -> None:
    ended = in_two_processes(PROBES, tmp_path / "run", output=tmp_path / "printed")
    assert [code for code, _ in ended] == [0, 0], ended
    assert [output.strip().splitlines()[-1] for _, output in ended] == ["4 [2, 4]", "4 []"]
    for step in (2, 4):
        assert json.loads((tmp_path / f"run/probes/step-{step}/result.json").read_text())["step"] == step


def generated(weights: Path) -> list[list[int]]:
    model = load_hybrid_checkpoint(weights)
    return model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=12, do_sample=False).tolist()


@pytest.mark.slow
def test_a_probe_reads_the_whole_weights_of_a_checkpoint_that_zero3_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    (tmp_path / "probe.py").write_text(COPIES)
    out, zero3, probed = tmp_path / "run", REPOSITORY / "launch/zero3.json", tmp_path / "probed"
    ended = in_two_processes(ZERO3, out, zero3, tmp_path / "base", tmp_path / "probe.py", probed, output=tmp_path / "printed")
    assert [code for code, _ in ended] == [0, 0], ended
    (result,) = read_probes(out)
    assert result.step == 2 and generated(probed) == generated(out / "final")
