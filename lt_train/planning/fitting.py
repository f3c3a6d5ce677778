"""The training that fits a machine: method, length, sharding and micro-batch, by the memory that `lt-train plan` computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from lt_train.planning.memory import training_memory
from lt_train.planning.options import ShardingOption, sharding_options, shorter_lengths
from lt_train.planning.profiling import profile_memory, shortened_calibration
from lt_train.planning.setup import Machine, setup_of
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.recipe.schema import Recipe


@dataclass(frozen=True)
class FittingTraining:
    """
    Attributes:
        recipe: of its method; the settings below are not in it yet.
        option: the sharding, and the largest micro-batch with it.
        peak: bytes of each GPU.
    """

    recipe: Recipe
    length: int
    checkpointing: bool
    option: ShardingOption
    peak: int


def fitting_training(
    recipes: Sequence[Recipe], config: PreTrainedConfig, machine: Machine, shortest: int
) -> FittingTraining | None:
    """The first that fits: the full length before a shorter one, no host memory before some, the first recipe before the next, no
    gradient checkpointing before some, the least sharding.

    Args:
        recipes: that differ in their method alone, the preferred one first.
        shortest: tokens of data.max_length below which no training is wanted.
    """
    shapes = {id(recipe): model_shape(recipe, config) for recipe in recipes}
    return next(_fitting(recipes, shapes, machine, shortest), None)


def _fitting(
    recipes: Sequence[Recipe], shapes: Mapping[int, ModelShape], machine: Machine, shortest: int
) -> Iterator[FittingTraining]:
    longest = recipes[0].data.max_length
    lengths = [longest, *(length for length in shorter_lengths(longest) if length >= shortest)]
    for length in lengths:
        for in_host_memory in (False, True):
            for recipe in recipes:
                for checkpointing in (False, True):
                    yield from _shardings(recipe, shapes[id(recipe)], machine, length, checkpointing, in_host_memory)


def _shardings(
    recipe: Recipe, shape: ModelShape, machine: Machine, length: int, checkpointing: bool, in_host_memory: bool
) -> Iterator[FittingTraining]:
    assert recipe.train is not None
    setup = setup_of(recipe, recipe.train, machine, len(shape.spec.streaming_layers))
    setup = replace(setup, length=length, checkpointing=checkpointing)
    for option in sharding_options(recipe, recipe.train, shape, setup):
        useless = option.sharding.stage is not None and (machine.cpu or (machine.gpus == 1 and not in_host_memory))
        if option.micro_batch is None or useless or option.sharding.offload_optimizer != in_host_memory:
            continue
        memory = training_memory(shape, replace(setup, sharding=option.sharding, micro_batch=option.micro_batch))
        yield FittingTraining(recipe, length, checkpointing, option, memory.peak)


def fitting_calibration(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> int | None:
    """Tokens of a calibration sample with which scoring the layers fits: data.max_length, or less; None: it does not fit."""
    shape = model_shape(recipe, config)

    def fits(length: int) -> bool:
        needed = profile_memory(shortened_calibration(recipe, length), shape, machine)
        return needed is None or needed.peak <= machine.usable

    window = recipe.hybrid.w_sink + recipe.hybrid.w_recent
    lengths = (recipe.data.max_length, *shorter_lengths(recipe.data.max_length))
    return next((length for length in lengths if fits(length) and length > window), None)
