"""Options for a training that must fit into a GPU's memory: ZeRO stages with their largest micro-batch, and single changes that
make a recipe fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lt_train.planning.memory import training_memory
from lt_train.planning.setup import Machine, Setup, Sharding, setup_of
from lt_train.planning.shape import ModelShape
from lt_train.recipe.batch_size import batch_samples, data_parallel_size
from lt_train.recipe.schema import Recipe, Train
from lt_train.runtime.units import GIB
from lt_train.training.sequence_parallel import fitting_degrees

SHARDINGS = (
    (Sharding(), "null"),
    (Sharding(2), "launch/zero2.json"),
    (Sharding(3), "launch/zero3.json"),
    (Sharding(3, sums_in_fp32=False), "launch/zero3-bf16-sums.json"),
    (Sharding(3, offload_optimizer=True, offload_parameters=True), "launch/zero3-offload.json"),
)
"""The usual shardings, each with the train.deepspeed that it needs."""

MOST_GPUS = 1024
LENGTH_STEP = 1024


@dataclass(frozen=True)
class ShardingOption:
    """
    Attributes:
        file: the train.deepspeed that it needs.
        peak: bytes of each GPU at a micro-batch of 1.
        host: bytes of host memory, summed over all processes.
        micro_batch: the largest that fits and divides the batch; None: not even 1 fits.
    """

    sharding: Sharding
    file: str
    peak: int
    host: int
    micro_batch: int | None


def sharding_options(recipe: Recipe, train: Train, shape: ModelShape, setup: Setup) -> list[ShardingOption]:
    """The usual shardings with all other settings of the recipe."""
    rows = batch_samples(train, recipe.data) // data_parallel_size(train, setup.machine.gpus)
    found = []
    for sharding, file in _shardings(setup):
        if setup.sequence_parallel > 1 and sharding.stage is None:
            continue  # sequence parallelism needs DeepSpeed
        one = replace(setup, sharding=sharding, micro_batch=1)
        memory = training_memory(shape, one)
        largest = None
        for micro in (n for n in range(1, rows + 1) if rows % n == 0):
            if micro > 1 and setup.sequence_parallel > 1:
                break
            if training_memory(shape, replace(one, micro_batch=micro)).peak > setup.machine.usable:
                break
            largest = micro
        found.append(ShardingOption(sharding, file, memory.peak, memory.host, largest))
    return found


def suggestions(recipe: Recipe, train: Train, shape: ModelShape, setup: Setup) -> Iterator[str]:
    """Changes of one setting that make the training fit, the smallest change first."""

    def fits(other: Setup) -> bool:
        return training_memory(shape, other).peak <= other.machine.usable

    if not setup.checkpointing and fits(replace(setup, checkpointing=True)):
        yield "--set train.gradient_checkpointing=true"
    if setup.micro_batch > 1 and fits(replace(setup, micro_batch=1)):
        yield "--set train.micro_batch_size=1"
    for sharding, file in _shardings(setup):
        other = replace(setup, sharding=sharding)
        if sharding.stage is not None and sharding != setup.sharding and fits(other):
            host = training_memory(shape, other).host
            yield f"--set train.deepspeed={file}" + (f" and {host / GIB:,.0f} GiB of host memory" if host else "")
            break
    degree = next((degree for degree in _degrees(train, shape, setup) if fits(replace(setup, sequence_parallel=degree))), None)
    if degree is not None:
        yield f"--set train.sequence_parallel={degree}"
    more = next(
        (
            gpus
            for gpus in _more_gpus(recipe, train, setup)
            if fits(setup_of(recipe, train, gpus, len(shape.spec.streaming_layers)))
        ),
        None,
    )
    if more is not None:
        yield f"{more.gpus} GPUs of this size"
    length = next((length for length in shorter_lengths(setup.length) if fits(replace(setup, length=length))), None)
    if length is not None:
        yield f"--set data.max_length={length}; data.overlong then applies to longer samples"


def _shardings(setup: Setup) -> list[tuple[Sharding, str]]:
    """SHARDINGS, without the one that accumulates gradients in bf16 where no bf16 gradients are accumulated."""
    return [(sharding, file) for sharding, file in SHARDINGS if sharding.sums_in_fp32 or (setup.bf16 and setup.accumulates)]


def _degrees(train: Train, shape: ModelShape, setup: Setup) -> Iterator[int]:
    """Larger values of train.sequence_parallel that divide the GPUs and the heads, the smallest first."""
    if train.deepspeed is None or setup.micro_batch > 1:
        return
    for degree in fitting_degrees(shape.heads, shape.key_heads):
        if degree > setup.sequence_parallel and setup.machine.gpus % degree == 0:
            yield degree


def _more_gpus(recipe: Recipe, train: Train, setup: Setup) -> Iterator[Machine]:
    """Machines with more GPUs that divide the batch."""
    for gpus in range(setup.machine.gpus + 1, MOST_GPUS + 1):
        rows = setup.micro_batch * gpus / setup.sequence_parallel
        if rows.is_integer() and batch_samples(train, recipe.data) % int(rows) == 0:
            yield replace(setup.machine, gpus=gpus)


def shorter_lengths(length: int) -> Iterator[int]:
    """Multiples of LENGTH_STEP below `length`, the longest first."""
    return iter(range((length - 1) // LENGTH_STEP * LENGTH_STEP, 0, -LENGTH_STEP))
