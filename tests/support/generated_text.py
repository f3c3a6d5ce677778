"""What a checkpoint generates."""

from pathlib import Path

import torch

from lt_train.hybrid.loading import load_hybrid_checkpoint


def generated(weights: Path) -> str:
    model = load_hybrid_checkpoint(weights)
    return str(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=12, do_sample=False).tolist())
