"""The start of a launch: checks before anything long begins, in the first step of a run, and DeepSpeed's communication."""

import os
from importlib.util import find_spec

import torch

from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError, more
from lt_train.runtime.processes import Process, number_in_environment

OF_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "model.dtype",
    "ACCELERATE_DYNAMO_BACKEND": "nothing, for lt_train compiles no training",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "train.deepspeed",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "train.deepspeed",
    "ACCELERATE_USE_FSDP": "train.deepspeed, as launch/zero3.json",
    "ACCELERATE_USE_MEGATRON_LM": "train.deepspeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train.sequence_parallel",
}
"""Variables by which `accelerate launch` changes a training, and what does so in a recipe. ACCELERATE_USE_DEEPSPEED is not among
them, because accelerate leaves it in the process after a training with DeepSpeed."""

SIZES_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Numbers of processes, by which accelerate counts them where there is no GPU (accelerate/state.py, _prepare_backend)."""


def check_launch(recipe: Recipe, train: Train, process: Process) -> None:
    """
    Raises:
        UserError: another launcher would change the training, the batch size does not divide among the processes, the device
            cannot compute in `model.dtype`, one process would leave GPUs unused, or the recipe sets DeepSpeed and no launcher
            started it or it is not installed.
    """
    _check_other_launchers(process)
    accumulation_steps(train, recipe.data, process.count)
    compute_dtype(recipe.model.dtype)
    devices = torch.accelerator.device_count()
    if devices > 1 and not process.launched:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: {devices} GPUs are visible to one process, which would use only one. "
            f"Fix: start one process for each (deepspeed --num_gpus {devices} --module lt_train train …, or torchrun), "
            "or make only one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if train.deepspeed is None:
        return
    if find_spec("deepspeed") is None:
        raise UserError(
            f"train.deepspeed: {train.deepspeed}: the package deepspeed is not installed. "
            "Fix: install it (pip install deepspeed), or set train.deepspeed to null"
        )
    if not process.launched:
        raise UserError(
            f"train.deepspeed: {train.deepspeed}: no launcher started this process. Fix: start it with "
            "deepspeed --num_gpus N --module lt_train train RECIPE (--num_accelerators N on CPUs), or set train.deepspeed to null"
            + more("no-launcher-started-this-process")
        )


def _check_other_launchers(process: Process) -> None:
    for name, setting in OF_ACCELERATE.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "no", "false"):
            raise UserError(
                f"{name}: {value}: accelerate's settings would change this training, and neither recipe nor results would show it. "
                f"Fix: start it with torchrun or deepspeed, or leave this out of accelerate's config; in a recipe it is {setting}"
            )
    for name in SIZES_OF_MPI:
        if (count := number_in_environment(name, 1)) > 1 and process.count == 1:
            raise UserError(
                f"{name}: {count}: processes that MPI starts do not train together. Fix: start them with torchrun or "
                f"deepspeed (launch/README.md), or unset {name} to train in this process alone"
            )


def start_deepspeed() -> None:
    """Start DeepSpeed's own communication, in addition to accelerate's.

    Without a GPU, accelerate starts only torch.distributed, and DeepSpeed would shard a model during loading (zero.Init) for a
    world size of 1.
    """
    import deepspeed

    if not torch.accelerator.is_available():
        # DeepSpeed's shared-memory collectives need a compiler and a minute or two at the first start, and wait forever for a
        # process that has died; gloo does not need them. deepspeed/ops/__init__.py makes this table for such edits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
