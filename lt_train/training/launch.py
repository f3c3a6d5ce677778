"""The start of a launch: checks before anything long begins, in the first step of a run, and DeepSpeed's communication."""

from importlib.util import find_spec

import torch

from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError, more
from lt_train.runtime.processes import Process


def check_launch(recipe: Recipe, train: Train, process: Process) -> None:
    """
    Raises:
        UserError: the batch size does not divide among the processes, the device cannot compute in `model.dtype`, one process would
            leave GPUs unused, or the recipe sets DeepSpeed and no launcher started it or it is not installed.
    """
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
