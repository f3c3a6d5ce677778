"""How large an optimizer step is, and how the processes of a training share it.

A recipe says the batch once, over all processes. Micro-batch, accumulation and DeepSpeed's fields follow from it.
"""

from lt_train.recipe.schema import Data, Train
from lt_train.runtime.errors import UserError


def batch_samples(train: Train, data: Data) -> int:
    """Samples (packs, when packing) per optimizer step over all processes. A pack counts as data.max_length tokens."""
    if train.batch_tokens is not None:
        return train.batch_tokens // data.max_length
    assert train.batch_size is not None, "a checked recipe has one of the two"
    return train.batch_size


def data_parallel_size(train: Train, processes: int) -> int:
    """How many of the `processes`, or of the groups of them that share a sequence, see samples of their own.

    Raises:
        UserError: the processes cannot be put into groups of train.sequence_parallel.
    """
    if processes % train.sequence_parallel:
        near = nearest_multiples(processes, train.sequence_parallel)
        raise UserError(
            f"train.sequence_parallel: {processes} processes cannot be put into groups of {train.sequence_parallel}, each of which "
            f"shares a sequence. Start {near} processes, or lower it"
        )
    return processes // train.sequence_parallel


def accumulation_steps(train: Train, data: Data, processes: int) -> int:
    """Micro-batches that each process runs before an optimizer step.

    Raises:
        UserError: the batch is not made of whole micro-batches on `processes` processes.
    """
    sharing = data_parallel_size(train, processes)
    at_once = train.micro_batch_size * sharing
    batch = batch_samples(train, data)
    if batch % at_once:
        setting, unit = ("batch_size", 1) if train.batch_tokens is None else ("batch_tokens", data.max_length)
        shared = f" and train.sequence_parallel {train.sequence_parallel}" if train.sequence_parallel > 1 else ""
        ways = [*_other_processes(batch, train, sharing), *_smaller_micro_batch(batch, train, sharing)]
        raise UserError(
            f"train.{setting}: {batch * unit:,} cannot be shared out: {processes} processes with train.micro_batch_size "
            f"{train.micro_batch_size}{shared} take {at_once * unit:,} at a time. "
            f"The nearest that can: {nearest_multiples(batch * unit, at_once * unit)}"
            f"{'. Or ' if ways else ''}{', or '.join(ways)}"
        )
    return batch // at_once


def nearest_multiples(number: int, of: int) -> str:
    """The multiples of `of` around `number`, which is none, in words: "91 or 98"."""
    below = number // of * of
    return f"{below:,} or {below + of:,}" if below else f"{of:,}"


def _other_processes(batch: int, train: Train, sharing: int) -> list[str]:
    """The numbers of processes around `sharing` groups of them that share `batch` out in whole micro-batches, in words."""
    micro = train.micro_batch_size
    fitting = [n for n in range(1, batch // micro + 1) if batch % (n * micro) == 0]
    below, above = [n for n in fitting if n < sharing][-1:], [n for n in fitting if n > sharing][:1]
    counts = [n * train.sequence_parallel for n in below + above]
    return [f"start {' or '.join(map(str, counts))} {'process' if counts == [1] else 'processes'}"] if counts else []


def _smaller_micro_batch(batch: int, train: Train, sharing: int) -> list[str]:
    """The largest micro-batch below the recipe's with which `sharing` groups share out `batch`, in words."""
    fitting = [size for size in range(1, train.micro_batch_size) if batch % (size * sharing) == 0]
    return [f"set train.micro_batch_size to {fitting[-1]}"] if fitting else []
