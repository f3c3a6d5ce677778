"""A teacher on disk for the tiny training's examples."""

from pathlib import Path
from typing import Any

import torch

from lt_train.training.distillation.top_k import write_top_k
from tests.support.tiny_training import load_decided, tiny_examples

EXAMPLES = tiny_examples().train
FINGERPRINT = {"model": "m", "data": "d"}
K, TEMPERATURE = 5, 1.5


def write(folder: Path, examples: Any = EXAMPLES, **given: Any) -> None:
    settings = {"k": K, "temperature": TEMPERATURE, "fingerprint": FINGERPRINT, "batch_size": 4, "progress": False}
    write_top_k(load_decided(torch.float32), examples, folder, **settings | given)
