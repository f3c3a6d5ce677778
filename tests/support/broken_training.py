"""A training that meets NaN where a certain sample comes."""

import math
from typing import Any

import torch

from tests.support.tiny_training import LoadModel, load_tiny, tiny_examples

EVERY_STEP: dict[str, Any] = {"train": {"max_steps": 6, "save_steps": 1, "keep_checkpoints": 2, "logging_steps": 100}}
BAD = tiny_examples().train[7]


def contains(input_ids_BL: torch.Tensor, sample: Any) -> bool:
    ids = list(sample.input_ids)
    return any(row[start : start + len(ids)] == ids for row in input_ids_BL.tolist() for start in range(len(row)))


def breaks_on(sample: Any) -> LoadModel:
    """A model that is NaN on whatever batch holds `sample`."""

    def load(dtype: torch.dtype) -> torch.nn.Module:
        model = load_tiny(dtype)
        poisoned = []

        def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            poisoned[:] = [contains(kwargs["input_ids"], sample)]

        model.register_forward_pre_hook(look, with_kwargs=True)
        model.model.norm.register_forward_hook(lambda module, args, output: output * math.nan if poisoned[0] else output)
        return model

    return load
