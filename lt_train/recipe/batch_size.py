"""The size of an optimizer step, and how the processes of a training share it.

A recipe sets the batch once, over all processes. Micro-batch, accumulation and DeepSpeed's fields follow from it.
"""

import math

from lt_train.recipe.faults import nearest_multiples
from lt_train.recipe.schema import Data, Train
from lt_train.runtime.errors import UserError, more


def batch_samples(train: Train, data: Data) -> int:
    """Samples (with packing: rows) per optimizer step over all processes. A row counts as data.max_length tokens."""
    if train.batch_tokens is not None:
        return train.batch_tokens // data.max_length
    assert train.batch_size is not None, "a checked recipe has one of the two"
    return train.batch_size


def data_parallel_size(train: Train, world_size: int) -> int:
    """Number of processes, or of groups of them that share a sequence, that see samples of their own.

    Raises:
        UserError: the processes do not form complete groups of train.sequence_parallel.
    """
    if world_size % train.sequence_parallel:
        near = nearest_multiples(world_size, train.sequence_parallel)
        raise UserError(
            f"train.sequence_parallel: {train.sequence_parallel}: {world_size} processes do not form complete groups of this size. "
            f"Fix: start {near} processes, or lower it"
        )
    return world_size // train.sequence_parallel


def accumulation_steps(train: Train, data: Data, world_size: int) -> int:
    """Micro-batches that each process runs before an optimizer step.

    Raises:
        UserError: the batch is no multiple of the micro-batches on `world_size` processes.
    """
    groups, batch = data_parallel_size(train, world_size), batch_samples(train, data)
    at_once = train.micro_batch_size * groups
    if batch % at_once:
        setting, unit = ("batch_size", 1) if train.batch_tokens is None else ("batch_tokens", data.max_length)
        parallel = f" and train.sequence_parallel {train.sequence_parallel}" if train.sequence_parallel > 1 else ""
        near = nearest_multiples(batch * unit, at_once * unit)
        options = [f"set it to {near}", *_other_world_sizes(batch, train, groups), *_smaller_micro_batch(batch, train, groups)]
        raise UserError(
            f"train.{setting}: {batch * unit:,}: not a multiple of the {at_once * unit:,} that {world_size} processes with "
            f"train.micro_batch_size {train.micro_batch_size}{parallel} take at a time. Fix: {', or '.join(options)}"
            + more("not-a-multiple-of-the-batch-does-not-divide")
        )
    return batch // at_once


def _other_world_sizes(batch: int, train: Train, groups: int) -> list[str]:
    """The nearest numbers of processes that divide `batch` into complete micro-batches, in words."""
    fitting = _divisors(batch // train.micro_batch_size)
    below, above = [n for n in fitting if n < groups][-1:], [n for n in fitting if n > groups][:1]
    counts = [n * train.sequence_parallel for n in below + above]
    return [f"start {' or '.join(map(str, counts))} {'process' if counts == [1] else 'processes'}"] if counts else []


def _smaller_micro_batch(batch: int, train: Train, groups: int) -> list[str]:
    """The largest micro-batch below the recipe's with which `groups` divide `batch`, in words."""
    fitting = [size for size in _divisors(batch // groups) if size < train.micro_batch_size] if batch % groups == 0 else []
    return [f"set train.micro_batch_size to {fitting[-1]}"] if fitting else []


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
