"""Several processes share each training sequence: DeepSpeed's Ulysses exchange around our attention, and slices of the batches.

For the rest of training, slices are data-parallel rows. TRL's loss is a sum over a process's own tokens, divided by the tokens of
the whole step; gradients are averaged over all processes as ever; so an answer token weighs the same wherever it lies.

Upstream's way in (accelerate's ParallelismConfig with sp_backend="deepspeed", accelerate 1.15, deepspeed 0.19) is not taken:
its `UlyssesSPDataLoaderAdapter` stops at the 1-D `cu_seq_lens` of TRL's packed batches, cannot skip the batches that a resumed run
has seen, and with it the loss becomes a mean of each micro-batch's mean; `register_with_transformers` would put its wrapper in
the place of our attention for every hybrid in the process.
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
from lt_train.hybrid.sequence_parallel import attend_gathered
from lt_train.runtime.errors import UserError

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class ShardedSequences:
    """`degree` processes with neighbouring ranks share a sequence."""

    degree: int
    rank: int
    processes: int

    def assign_rows(self, loader: DataLoader) -> None:
        """Let the processes that share a sequence read the same rows. accelerate would deal each process rows of its own.

        Raises:
            UserError: rows are dealt in another way than row by row to all processes in turn.
        """
        shard = loader.batch_sampler
        if not isinstance(shard, BatchSamplerShard) or shard.split_batches or shard.num_processes != self.processes:
            raise UserError(
                "train.sequence_parallel: rows are dealt to the processes in an order of their own, so that those that share a "
                "sequence would not read the same. Take accelerator_config and train_sampling_strategy out of train.trl"
            )
        shard.num_processes = self.processes // self.degree
        shard.process_index = self.rank // self.degree

    def slicing(self, collate: Collator) -> Collator:
        """`collate`, then this process's slice of the columns."""
        return lambda rows: shard_of(collate(rows), self.rank % self.degree, self.degree)


def shard_of(batch: dict[str, Any], index: int, slices: int) -> dict[str, Tensor]:
    """The columns of slice `index`: input_ids, labels, labels shifted by one over the whole row, positions in the whole row.

    Args:
        batch: TRL's, [B, T]: with position_ids, or with an attention_mask and right padding; T is a multiple of `slices`.
    """
    whole = {name: batch[name] for name in ("input_ids", "labels")}
    whole["shift_labels"] = pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    if "position_ids" in batch:
        whole["position_ids"] = batch["position_ids"]
    else:
        whole["position_ids"] = (batch["attention_mask"].cumsum(1) - 1) * batch["attention_mask"]
    return {name: column_BT.tensor_split(slices, dim=1)[index].contiguous() for name, column_BT in whole.items()}


def shard_sequences(model: HybridForCausalLM, degree: int) -> ShardedSequences:
    """Make a hybrid attend over sequences that each `degree` neighbouring processes share. Every process calls it once.

    Raises:
        UserError: the model's heads cannot be shared out.
    """
    # Imported here: DeepSpeed is not needed for any other training.
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
    model.shard_sequences(ulysses.forward)
    return ShardedSequences(degree, dist.get_rank(), dist.get_world_size())


def check_heads(degree: int, heads: int, groups: int) -> None:
    """
    Raises:
        UserError: `degree` processes cannot share so many query heads and groups of them, one for each key/value head.
    """
    fitting = fitting_degrees(heads, groups)
    if degree not in fitting:
        raise UserError(
            f"train.sequence_parallel: {degree} processes cannot share {heads} query heads and {groups} key/value heads. "
            f"These can: {', '.join(map(str, fitting))}"
        )


def fitting_degrees(heads: int, groups: int) -> list[int]:
    return [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
