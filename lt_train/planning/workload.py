"""The amount of training: samples, tokens and optimizer steps, counted in the data where they are local, else from options."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from lt_train.hybrid.context_length import context_length
from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import RunPaths
from lt_train.runtime.sources import load_rows, resolve_data

MOST_SAMPLES = 10**8
"""A plan holds the length of each in memory."""


@dataclass(frozen=True)
class Samples:
    """
    Attributes:
        lengths: tokens of each training sample, prompt and answer; the mean length for all where only that is known.
        source: the origin of number and lengths, for the table.
    """

    lengths: Sequence[int]
    source: str

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Workload:
    """All of a training.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the data, a fraction where `max_steps` ends within one.
        tokens: over all steps, without padding.
    """

    samples: Samples
    steps: int
    epochs: float

    @property
    def tokens(self) -> float:
        return self.epochs * sum(self.samples.lengths)


def training_work(recipe: Recipe, train: Train, samples: Samples) -> Workload:
    """Steps as transformers counts them: the last step of an epoch may be smaller than the others."""
    rows = len(samples.lengths)
    if recipe.data.packing:  # best-fit packs are nearly full
        rows = math.ceil(sum(samples.lengths) / recipe.data.max_length)
    batch = batch_samples(train, recipe.data)
    if train.max_steps is not None:
        return Workload(samples, train.max_steps, train.max_steps * batch / rows)
    epochs = train.epochs or 1.0
    return Workload(samples, math.ceil(epochs * math.ceil(rows / batch)), epochs)


def training_samples(
    recipe: Recipe, base_config: PreTrainedConfig, count: int | None, mean: int | None, runs: Path = Path("runs")
) -> Samples | None:
    """The training samples without the held-out ones; None where neither the data nor `count` nor data.limit gives their number.

    Args:
        count: --samples, of the data before held-out samples are taken. mean: --mean-tokens, of a sample.
        runs: the folder of run folders.

    Raises:
        UserError: a count or a mean below 1, a count that leaves no sample, or faulty local data.
    """
    for option, value in (("--samples", count), ("--mean-tokens", mean)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value}: below 1. Fix: set it to at least 1")
    if mean is not None and mean > recipe.data.max_length:
        raise UserError(
            f"--mean-tokens: {mean}: more than data.max_length, the longest training sample. Fix: set it to at most "
            f"{recipe.data.max_length}"
        )
    if count is None and mean is None:
        counted = _counted(recipe, base_config, runs)
        if counted is not None:
            return counted
    source = "--samples"
    if count is None:
        count, source = _rows(recipe)
    if count is None:
        return None
    left = count - recipe.data.heldout
    if left < 1:
        raise UserError(
            f"{source}: {count}: data.heldout takes {recipe.data.heldout} samples, none is left to train on. Fix: give more "
            "samples, or lower data.heldout"
        )
    if left > MOST_SAMPLES:
        raise UserError(f"{source}: {count:,}: more than {MOST_SAMPLES:,}. Fix: plan for fewer samples; the hours grow with them")
    if mean is None:
        return Samples(
            [recipe.data.max_length] * left,
            f"from {source}, each of data.max_length tokens, an upper bound; see --mean-tokens",
        )
    return Samples([mean] * left, f"from {source} and --mean-tokens")


def _rows(recipe: Recipe) -> tuple[int | None, str]:
    """The number of rows, and its origin."""
    data = recipe.data
    if isinstance(resolve_data(data.traces), Path):
        return sum(1 for _ in load_rows(data.traces, data.split, data.limit, data.subset)), f"the rows of {data.traces}"
    return data.limit, "data.limit"


def _counted(recipe: Recipe, base_config: PreTrainedConfig, runs: Path) -> Samples | None:
    """The samples of the data themselves, where they and the tokenizer are local; as the run has tokenized them, where it has."""
    if not isinstance(resolve_data(recipe.data.traces), Path):
        return None
    from lt_train.dataset.loading import training_lengths
    from lt_train.inference.loading import eos_ids
    from lt_train.inference.tokenizer import has_local_tokenizer, load_checked_tokenizer

    if not has_local_tokenizer(recipe.model):
        return None

    tokenizer = load_checked_tokenizer(recipe.model, base_config, recipe.prompt)
    lengths = training_lengths(
        recipe.data,
        recipe.prompt,
        tokenizer,
        model_max_length=context_length(base_config.to_dict()),
        seed=recipe.seed,
        eos_ids=eos_ids(recipe.model),
        folder=RunPaths(runs / recipe.name).data,
    )
    return Samples(lengths.tolist(), f"counted in {recipe.data.source}")
