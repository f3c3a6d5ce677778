"""`lt-train validate` in two processes, with a recipe that one, or both, cannot load while the other waits for it."""

import os
import sys

import torch

import lt_train.recipe.loading
from lt_train import cli
from lt_train.runtime import processes
from lt_train.runtime.errors import UserError


def validate(kind: str, failing: str) -> None:
    """The work of each process; it ends as the command does. `kind`: mistake or bug; `failing`: the ranks that fail, 1 or 01."""

    def load_recipe(*_: object) -> None:
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        if os.environ["RANK"] in failing:
            if kind == "mistake":
                raise UserError("this recipe is spoilt")
            processes.SECONDS_FOR_THE_LAUNCHER = 0.5  # no launcher is there to end it
            raise ZeroDivisionError("a bug")
        torch.distributed.barrier()

    sys.argv[1:] = ["validate", "any.yaml"]
    lt_train.recipe.loading.load_recipe_and_remarks = load_recipe
    cli.main()
