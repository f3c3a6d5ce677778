"""One training step of a hybrid against one of the unconverted model with stock TRL, in one run.

Both have the same rows, the same settings and the same adapters; their steps are interleaved. Each row is one document of full
length, because with stock attention on a CPU packed documents see each other, which is different work.

The limit is the ratio of floating-point operations, counted as in `lt-train plan`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import datasets
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from lt_train.bench.base import Base, hybrid_spec
from lt_train.bench.printing import print_lines
from lt_train.planning.compute import Compute, training_compute
from lt_train.planning.shape import model_shape
from lt_train.planning.workload import Samples, Workload
from lt_train.recipe.schema import Recipe
from lt_train.runtime.devices import compute_device, device_name, wait_for
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress
from lt_train.training.settings import sft_config, weights_dtype
from lt_train.training.sft_trainer import HybridSFTTrainer
from lt_train.training.trainable import lora_config

Method = Literal["lora", "full"]


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step: forward, backward, clipping and the optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        wait_for(compute_device())
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait_for(compute_device())
        self.seconds.append(time.perf_counter() - self._started)


@dataclass(frozen=True)
class StepComparison:
    """Median seconds of a step, the loss of the first (untrained) step, and the operations of a hybrid's step."""

    stock: float
    hybrid: float
    stock_loss: float
    hybrid_loss: float
    compute: Compute

    @property
    def faster(self) -> float:
        return self.stock / self.hybrid

    @property
    def limit(self) -> float:
        return (self.compute.linear + self.compute.full_attention) / self.compute.total


def step_recipe(
    base: str, method: Method, ratio: float, w_sink: int, w_recent: int, tokens: int, checkpointing: bool, dtype: str = "auto"
) -> Recipe:
    """The recipe of both trainings: one row of `tokens` a step.

    Raises:
        UserError: a size or ratio that is invalid in a recipe.
    """
    settings = {"batch_size": 1, "max_steps": 1, "learning_rate": 1e-5, "gradient_checkpointing": checkpointing}
    parts = {
        "name": "training-step",
        "model": {"base": base, "dtype": dtype},
        "hybrid": {"lazy_layer_ratio": ratio, "w_sink": w_sink, "w_recent": w_recent},
        "data": {"source": "random", "format": "messages", "max_length": tokens, "packing": False},
        "train": {"method": method, **settings},
    }
    try:
        return Recipe.model_validate(parts | ({"lora": {"layers": "all"}} if method == "lora" else {}))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['input']}: {fault['msg']}" for fault in error.errors())
        raise UserError(f"{'; '.join(faults)}. Fix: change the option that sets it") from error


def compare_steps(base: Base, recipe: Recipe, runs: int) -> StepComparison:
    """Each trainer takes one warm-up step; then `runs` steps of both are interleaved."""
    assert recipe.train is not None and recipe.hybrid.lazy_layer_ratio is not None
    config, tokenizer, tokens = base.config(), base.tokenizer(), recipe.data.max_length
    spec = hybrid_spec(config, recipe.hybrid.lazy_layer_ratio, recipe.hybrid.w_sink, recipe.hybrid.w_recent)
    dtype = weights_dtype(recipe, recipe.train)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": [ids], "labels": [ids]})
    with TemporaryDirectory() as folder:
        args = sft_config(recipe, recipe.train, Path(folder))
        args.save_strategy = SaveStrategy.NO
        stock, hybrid = base.for_training(spec, dtype)
        hybrid.name_or_path = ""
        trainers = [
            kind(
                model=model,
                args=args,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora_config(recipe.lora, spec, model) if recipe.lora is not None else None,
            )
            for kind, model in ((SFTTrainer, stock), (HybridSFTTrainer, hybrid))
        ]
        times = [StepTimes() for _ in trainers]
        for trainer, timed in zip(trainers, times, strict=True):
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(timed)
        losses: list[float] = []
        with show_progress("timing steps", total=2 * (1 + runs)) as bar:
            for _ in range(1 + runs):
                for trainer in trainers:
                    losses.append(trainer.train().training_loss)
                    bar.advance()
    stock_seconds, hybrid_seconds = (median(timed.seconds[1:]) for timed in times)
    work = Workload(Samples([tokens], "one row"), steps=1, epochs=1)
    compute = training_compute(model_shape(recipe, config), recipe.train, work)
    return StepComparison(stock_seconds, hybrid_seconds, losses[0], losses[1], compute)


def bench_training_step(base: Base, recipe: Recipe, runs: int, console: Console) -> None:
    """Print both times, their ratio and the limit.

    Raises:
        UserError: there is no such model, no layer or every layer would stream, or `runs` is below 1.
    """
    if runs < 1:
        raise UserError(f"--runs: {runs}: too few. Fix: set at least 1")
    assert recipe.train is not None
    found = compare_steps(base, recipe, runs)
    hybrid, device = recipe.hybrid, compute_device()
    trained = "all weights" if recipe.lora is None else f"LoRA of rank {recipe.lora.rank} on q, k, v and o of all layers"
    checkpointing = "with" if recipe.train.gradient_checkpointing else "without"
    print_lines(
        console,
        f"{base.name}, {device_name(device)}; {hybrid.lazy_layer_ratio:.0%} of layers stream, "
        f"w_sink {hybrid.w_sink}, w_recent {hybrid.w_recent}; one document of {recipe.data.max_length:,} tokens a step, {trained}, "
        f"{checkpointing} gradient checkpointing; medians of {runs}\n"
        f"unconverted, stock TRL  {found.stock:9,.2f} s a step, loss {found.stock_loss:.3f}\n"
        f"hybrid                  {found.hybrid:9,.2f} s a step, loss {found.hybrid_loss:.3f}\n"
        f"faster by               {found.faster:9.2f}x\n"
        f"limit by operations     {found.limit:9.2f}x, {100 * found.faster / found.limit:.0f} % of it reached",
    )
