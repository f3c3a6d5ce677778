"""Which parameters a step of training changes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lt_train.hybrid.spec import HybridSpec
from lt_train.training import trainer as training
from tests.support.tiny_training import SPEC, load_tiny, tiny_examples, tiny_recipe, tiny_tokenizer


def parameters_with_gradients(settings: dict[str, Any], out: Path, spec: HybridSpec = SPEC) -> set[str]:
    """Names of the parameters that a step of training changes, found from their gradients."""
    recipe = tiny_recipe(settings)
    config = training.sft_config(recipe, recipe.train, out)
    trainer = training._build_trainer(recipe, config, partial(load_tiny, spec=spec), tiny_tokenizer(), tiny_examples(), spec)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(10))
    return {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
