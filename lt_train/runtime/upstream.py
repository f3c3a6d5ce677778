"""What other libraries say to their developers, kept out of a user's sight."""

import logging
import os
import warnings


def quiet_upstream() -> None:
    """Keep out of a user's sight what other libraries say to their developers."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none, wherever it is imported
    # Libraries tell each other by these what will be renamed: DeepSpeed's calls of torch, peft's of transformers, and so on
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate compares DeepSpeed's accumulation with its own, which Trainer leaves at 1
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
