"""What must be true of a launch before anything long begins: asked first, not after hours of scoring layers."""

from importlib.util import find_spec

import torch

from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process


def check_launch(recipe: Recipe, train: Train, process: Process) -> None:
    """
    Raises:
        UserError: the processes cannot share the batch, the device cannot compute in `model.dtype`, one process would leave GPUs
            unused, or DeepSpeed is asked for and was not started or is not there.
    """
    accumulation_steps(train, recipe.data, process.count)
    compute_dtype(recipe.model.dtype)
    devices = torch.accelerator.device_count()
    if devices > 1 and not process.launched:
        raise UserError(
            f"{devices} GPUs are visible to one process. Start one process for each (deepspeed --num_gpus {devices} --module "
            "lt_train train …, or torchrun), or show it only one (CUDA_VISIBLE_DEVICES=0)"
        )
    if train.deepspeed is None:
        return
    if find_spec("deepspeed") is None:
        raise UserError(
            f"train.deepspeed: {train.deepspeed}: the package deepspeed is not installed. "
            "Install it (pip install deepspeed), or set train.deepspeed to null"
        )
    if not process.launched:
        raise UserError(
            "train.deepspeed: no launcher started this process. Start it with "
            "deepspeed --num_gpus N --module lt_train train RECIPE (--num_accelerators N on CPUs), or set train.deepspeed to null"
        )
