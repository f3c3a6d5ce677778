"""The checks of a launch before anything long starts, and the content of a launch folder."""

import subprocess
from pathlib import Path

import pytest
import torch

from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.training import launch
from tests.support.repository import REPOSITORY
from tests.support.tiny_training import tiny_recipe

ZERO3 = {"train": {"deepspeed": str(REPOSITORY / "launch/zero3.json")}}


def check(settings: dict, process: Process) -> None:
    recipe = tiny_recipe(settings)
    launch.check_launch(recipe, recipe.train, process)


def test_deepspeed_without_a_launcher_is_an_error_with_the_launch_line() -> None:
    with pytest.raises(UserError, match=r"no launcher started this process.*deepspeed --num_gpus"):
        check(ZERO3, Process(0, 1, launched=False))
    check(ZERO3, Process(0, 1, launched=True))


def test_a_missing_deepspeed_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package deepspeed is not installed"):
        check(ZERO3, Process(0, 1, launched=True))
    check({}, Process(0, 1, launched=False))


def test_processes_among_which_the_batch_does_not_divide_are_reported_before_anything_begins() -> None:
    with pytest.raises(UserError, match=r"the 6 that 3 processes with train\.micro_batch_size 2 take at a time"):
        check({}, Process(0, 3, launched=True))


def test_one_process_that_sees_several_gpus_is_refused_with_the_advice_to_start_one_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    with pytest.raises(UserError, match=r"8 GPUs are visible to one process.*--num_gpus 8"):
        check({}, Process(0, 1, launched=False))


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "model.dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compiles no training"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "train.deepspeed"),
        ("ACCELERATE_USE_FSDP", "true", "launch/zero3.json"),
    ],
)
def test_settings_of_accelerates_launcher_are_refused(name: str, value: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for harmless in ("no", "NO", "false"):
        monkeypatch.setenv(name, harmless)
        check({}, Process(0, 1, launched=True))
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: {value}: .*would change this training.*{setting}"):
        check({}, Process(0, 1, launched=True))


def test_processes_of_mpi_which_accelerate_would_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE: 2: processes that MPI starts do not train together"):
        check({}, Process(0, 1, launched=False))
    check({}, Process(0, 2, launched=True))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE: 'two': no whole number"):
        check({}, Process(0, 1, launched=False))


def test_bf16_on_a_gpu_that_does_not_compute_in_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match="Tesla V100 does not compute in bf16"):
        check({"model": {"dtype": "bf16"}}, Process(0, 1, launched=True))
    assert compute_dtype("auto") == torch.float32


def test_the_slurm_script_starts_one_torchrun_for_each_machine(tmp_path: Path) -> None:
    for name, does in (("scontrol", "printf 'node-1\\nnode-2\\n'"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    command = ["bash", REPOSITORY / "launch/train.slurm", "recipe.yaml", "--set", "name=a b"]
    path = f"{tmp_path}:/usr/bin:/bin"
    printed = subprocess.run(command, env={**environment, "PATH": path}, capture_output=True, text=True, check=True).stdout
    expected = "--kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 7 --rdzv-backend c10d "
    assert printed.strip() == expected + "--rdzv-endpoint node-1:29500 -m lt_train train recipe.yaml --set name=a b"


def test_deepspeed_reads_the_example_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(REPOSITORY / "launch/hostfile")) == {"node-1": 8, "node-2": 8}
