"""Warnings of other libraries to their developers, hidden from a user."""

import logging
import os
import warnings


def quiet_upstream() -> None:
    """Hide the warnings of other libraries to their developers."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none, wherever it is imported
    # Warnings of one library to another about future names: DeepSpeed's calls of torch, peft's of transformers, and so on
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate compares DeepSpeed's accumulation with its own, which Trainer leaves at 1
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
