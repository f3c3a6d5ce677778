"""Where the cached keys of a decoding step lie: pages and rings as blocks of adjacent keys, in the order of their tokens.

Shapes: B rows, N blocks, G key/value heads, T new tokens of a row, Q = R x T queries of one key/value head, D head size.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lt_train.hybrid.cache import slot_of
from lt_train.inference.kv_store import PAGE, PagedLayer, RingLayer


@dataclass(frozen=True)
class KeyBlocks:
    """Places of the cached keys of each row, and which of them each new token sees.

    Attributes:
        start_N: the element of keys and values at which each block's first head begins, row by row.
        length_N: the keys of each block: adjacent rows of each head.
        first_B: the number of each row's first block; one more entry, the number of blocks, ends it.
        seen_BT: how many keys each new token sees, from the row's first block on; the last token sees the latest key.
        left_BT: how many of these it does not see: those after the row's sinks, its first `always_B` keys in blocks of their own.
        head_stride: elements from one head of a block to the next.
        longest: most keys of a block.
    """

    start_N: Tensor
    length_N: Tensor
    first_B: Tensor
    seen_BT: Tensor
    left_BT: Tensor
    always_B: Tensor
    head_stride: int
    longest: int

    @classmethod
    def of_one_length(cls, start_N: Tensor, keys: int, first_B: Tensor, seen_BT: Tensor, head_stride: int) -> "KeyBlocks":
        """Blocks of `keys` keys; a token sees all keys before its last one."""
        nothing_BT = torch.zeros_like(seen_BT)
        return cls(
            *(start_N, torch.full_like(start_N, keys), first_B, seen_BT, nothing_BT, nothing_BT[:, 0].contiguous()),
            *(head_stride, keys),
        )

    @cached_property
    def earlier_N(self) -> Tensor:
        """The keys of all blocks before each block."""
        return self.length_N.cumsum(0) - self.length_N

    def tensors(self) -> list[Tensor]:
        """What differs from step to step."""
        return [self.start_N, self.length_N, self.first_B, self.seen_BT, self.left_BT, self.always_B]

    def holding(self, tensors: Iterable[Tensor]) -> "KeyBlocks":
        """Blocks of the same sizes with other tensors, in the order of `tensors()`."""
        start_N, length_N, first_B, seen_BT, left_BT, always_B = tensors
        return KeyBlocks(start_N, length_N, first_B, seen_BT, left_BT, always_B, self.head_stride, self.longest)

    def padded(self, blocks: int) -> "KeyBlocks":
        """With places for this number of blocks; those of no row are not read."""
        start_N, length_N, *rest = self.tensors()
        return self.holding([*(pad(x, (0, blocks - len(x))) for x in (start_N, length_N)), *rest])

    def to(self, device: torch.device) -> "KeyBlocks":
        return self if self.start_N.device == device else self.holding(x.to(device) for x in self.tensors())


def page_blocks(keys_NGPD: Tensor, pages: Sequence[Sequence[int]], seen_BT: Tensor) -> KeyBlocks:
    """The pages of each row, in the order of its tokens, as blocks of keys."""
    page_N = torch.from_numpy(np.fromiter(chain.from_iterable(pages), np.int64))
    first_B = torch.tensor([0, *map(len, pages)]).cumsum(0)
    return KeyBlocks.of_one_length(page_N * keys_NGPD.stride(0), keys_NGPD.shape[2], first_B, seen_BT, keys_NGPD.stride(1))


def ring_blocks(layer: RingLayer, position_BT: Tensor) -> KeyBlocks:
    """The ring of each row as blocks of keys in the order of their tokens: sinks, then what some new token's window reaches."""
    w_sink, w_recent = layer.spec.w_sink, layer.spec.w_recent
    after_B1 = position_BT[:, -1:] + 1
    earliest_B1 = (position_BT[:, :1] - w_recent + 1).clamp(min=w_sink)
    reached_B1 = (after_B1 - earliest_B1).clamp(min=0)
    slot_B1 = slot_of(earliest_B1, w_sink, layer.recent)
    before_turn_B1 = reached_B1.minimum(w_sink + layer.recent - slot_B1)  # the ring's last slot is followed by its first
    of_sinks, of_ring = torch.arange(0, w_sink, PAGE), torch.arange(0, layer.recent, PAGE)
    parts = [
        (0, after_B1.clamp(max=w_sink), of_sinks),
        (slot_B1, before_turn_B1, of_ring),
        (w_sink, reached_B1 - before_turn_B1, of_ring),
    ]
    row_B1 = torch.arange(len(position_BT))[:, None] * layer.keys.stride(0)
    start_BN = torch.cat([row_B1 + (slot + offset_P) * layer.keys.stride(2) for slot, _, offset_P in parts], dim=1)
    length_BN = torch.cat([(keys_B1 - offset_P).clamp(0, PAGE) for _, keys_B1, offset_P in parts], dim=1)
    is_block_BN = length_BN > 0
    first_B = pad(is_block_BN.sum(1).cumsum(0), (1, 0))
    seen_BT = torch.where(position_BT < w_sink, position_BT + 1, w_sink + position_BT + 1 - earliest_B1)
    left_BT = (position_BT - w_recent + 1 - earliest_B1).clamp(min=0)
    always_B = after_B1[:, 0].clamp(max=w_sink)
    start_N, length_N = start_BN[is_block_BN], length_BN[is_block_BN]
    return KeyBlocks(start_N, length_N, first_B, seen_BT, left_BT, always_B, layer.keys.stride(1), PAGE)


def most_blocks(layer: PagedLayer | RingLayer, rows: int) -> int:
    """The blocks that this number of rows has at most."""
    if isinstance(layer, PagedLayer):
        return len(layer.keys)
    return rows * (math.ceil(layer.spec.w_sink / PAGE) + math.ceil(layer.recent / PAGE) + 1)  # the ring turns within a block
