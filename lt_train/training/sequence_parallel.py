"""Sequence parallelism: DeepSpeed's Ulysses exchange around the hybrid's attention, and shards of each batch.

For the rest of training, shards are data-parallel rows. TRL's loss is a sum over a process's own tokens, divided by the tokens of
the entire step, and gradients are averaged over all processes; so each answer token has the same weight in any shard.

Upstream's integration (accelerate's ParallelismConfig with sp_backend="deepspeed", accelerate 1.15, deepspeed 0.19) is not used:
its `UlyssesSPDataLoaderAdapter` fails on the 1-D `cu_seq_lens` of TRL's packed batches, cannot skip the batches before a resumed
step, and makes the loss a mean of the micro-batches' means; `register_with_transformers` would replace the attention of every
hybrid in the process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from lt_train.dataset.examples import IGNORED
from lt_train.hybrid.kv_size import head_size
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.sequence_parallel import Shards, attend_gathered
from lt_train.runtime.errors import UserError

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class ShardedSequences:
    """Each `degree` processes with adjacent ranks hold the shards of one sequence."""

    degree: int
    rank: int
    world_size: int

    @property
    def group(self) -> int:
        """Of this process, among `groups`."""
        return self.rank // self.degree

    @property
    def groups(self) -> int:
        """How many read rows of their own."""
        return self.world_size // self.degree

    def assign_rows(self, loader: DataLoader) -> None:
        """Make the processes that shard a sequence read the same rows. accelerate gives each process rows of its own.

        Raises:
            UserError: accelerate does not assign rows one by one to all processes in turn.
        """
        shard = loader.batch_sampler
        if not isinstance(shard, BatchSamplerShard) or shard.split_batches or shard.num_processes != self.world_size:
            raise UserError(
                f"train.sequence_parallel: {self.degree}: train.trl changes the order in which rows are assigned to processes, so "
                "the processes of one sequence would read different rows. "
                "Fix: remove accelerator_config and train_sampling_strategy from train.trl"
            )
        shard.num_processes, shard.process_index = self.groups, self.group

    def sharded(self, collate: Collator) -> Collator:
        """`collate`, then this process's shard of the columns."""
        return lambda rows: shard_of(collate(rows), self.rank % self.degree, self.degree)


def shard_of(batch: dict[str, Any], index: int, degree: int) -> dict[str, Tensor]:
    """The columns of shard `index`: input_ids, labels, labels shifted by one over the entire row, positions in the entire row.

    Args:
        batch: TRL's, [B, T]: with position_ids, or with an attention_mask and right padding; T is a multiple of `degree`.
    """
    row = {name: batch[name] for name in ("input_ids", "labels")}
    row["shift_labels"] = pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    if "position_ids" in batch:
        row["position_ids"] = batch["position_ids"]
    else:
        row["position_ids"] = (batch["attention_mask"].cumsum(1) - 1) * batch["attention_mask"]
    return {name: column_BT.tensor_split(degree, dim=1)[index].contiguous() for name, column_BT in row.items()}


def shard_sequences(model: HybridForCausalLM, degree: int) -> ShardedSequences:
    """Make a hybrid attend over sequences sharded among each `degree` processes of adjacent ranks. Every process calls it once.

    Raises:
        UserError: the model's heads cannot be distributed.
    """
    # Imported here, because other trainings work without DeepSpeed.
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    check_heads(degree, heads, groups)
    group, _ = dist.new_subgroups(group_size=degree)
    ulysses = UlyssesSPAttentionHF(
        attn=attend_gathered,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=head_size(config.to_dict()),
        kv_head_count=groups,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )
    rank = dist.get_rank()
    model.shard_sequences(Shards(ulysses.forward, rank % degree, degree))
    return ShardedSequences(degree, rank, dist.get_world_size())


def check_heads(degree: int, heads: int, groups: int) -> None:
    """
    Raises:
        UserError: the query heads, or the groups of them (one for each key/value head), do not divide among `degree` processes.
    """
    fitting = fitting_degrees(heads, groups)
    if degree not in fitting:
        raise UserError(
            f"train.sequence_parallel: {degree}: {heads} query heads and {groups} key/value heads do not divide among {degree} "
            f"processes. Fix: set one of {', '.join(map(str, fitting))}"
        )


def fitting_degrees(heads: int, groups: int) -> list[int]:
    return [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
