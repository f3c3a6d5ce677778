"""The KV cache of a hybrid: full layers cache every token, streaming layers the sinks and a ring of the latest tokens.

A split layer does both, each for some of its KV heads. Positions count from a row's first real token, so under left padding sinks
are real tokens and padding is never stored in a ring. A streaming layer keeps position r in slot r while r < w_sink + w_recent,
then in slot w_sink + (r - w_sink) mod w_recent; a sliding layer does so with the base's window and no sinks. Keys are stored after
rotary embedding, so their order in the cache does not matter.

Shapes: B rows, G key/value heads, T new columns, S slots, D head size.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from .spec import HybridError, HybridSpec

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
"""The name of the cache argument of transformers' forward passes: `cache` since 5.24, which also accepts the old name until 6.0."""


@dataclass
class Rows:
    """The cached tokens of each row of the batch; one object for all layers, advanced once per forward pass.

    Attributes:
        columns: cached columns, padding included. new: columns of the current forward pass.
        before_B, after_B: cached real tokens of each row before and after the current forward pass; no rows before the first one.
        shortest, longest: the smallest and the largest of `after_B`.
    """

    columns: int = 0
    new: int = 0
    before_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    after_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    shortest: int = 0
    longest: int = 0

    def advance(self, real_BT: Tensor | None, batch: int, new: int, device: torch.device) -> None:
        """Add `new` columns. `real_BT` is True on real tokens; None: all of them are."""
        if self.columns == 0:
            self.after_B = torch.zeros(batch, dtype=torch.long, device=device)
        elif self.after_B.shape[0] != batch:
            raise HybridError(
                f"cache: it holds {self.after_B.shape[0]} rows, and the input has {batch}. Fix: make a cache for each batch"
            )
        self.columns += new
        self.new = new
        self.before_B = self.after_B
        if real_BT is None:
            self.after_B = self.before_B + new
            self.shortest += new
            self.longest += new
            return
        stale = (self.before_B > 0)[:, None] & ~real_BT
        if bool(stale.any()) or bool((real_BT[:, :-1] & ~real_BT[:, 1:]).any()):
            raise HybridError(
                "attention_mask: it has padding after a row's first real token, and a cache supports left padding only. "
                "Fix: set tokenizer.padding_side='left', or use_cache=False"
            )
        self.after_B = self.before_B + real_BT.sum(dim=1)
        self.shortest, self.longest = int(self.after_B.min()), int(self.after_B.max())

    def check_same_columns(self, real_BK: Tensor) -> None:
        """
        Args:
            real_BK: which of the cached columns a later mask shows.

        Raises:
            HybridError: the mask hides cached tokens, or shows columns that were padding when they were cached.
        """
        column_K = torch.arange(self.columns, device=real_BK.device)
        differs_BK = real_BK != (column_K >= self.padding_B[:, None].to(real_BK.device))
        if bool(differs_BK.any()):
            row, column = differs_BK.nonzero()[0].tolist()
            what = "shows padding" if bool(real_BK[row, column]) else "hides a token"
            raise HybridError(
                f"attention_mask: it {what} at row {row}, column {column}, and the cache was filled with another mask. Fix: pass "
                "that mask with ones for the new tokens, or pass all tokens again with use_cache=False"
            )

    @property
    def new_positions_BT(self) -> Tensor:
        """[B, T] position of each new column in its row; negative on padding."""
        column_T = torch.arange(self.new, device=self.after_B.device)
        return self.after_B[:, None] - self.new + column_T

    @property
    def padding_B(self) -> Tensor:
        return self.columns - self.after_B


class _BufferLayer(CacheLayerMixin):
    """Keys and values in buffers with room for more columns; `keys` and `values` are views of the columns in use."""

    keys: Any  # a Tensor once there is one; transformers annotates it with None, too
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def parts(self) -> "list[_BufferLayer]":
        return [self]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self._keys, self._values) if buffer is not None)

    def reset(self) -> None:
        self.keys = self.values = self._keys = self._values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _refused("beam search")


class GrowingLayer(_BufferLayer):
    """All tokens so far, in a buffer that grows by a quarter, so that a step writes one column and copies none.

    The first columns, a prompt's, have no room beside them: while a prompt is read, memory is scarce.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, D]; returns all columns so far, padding included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.columns = self.columns, self.columns + key_states.shape[2]
        room = max(256, self.columns // 4) if first else 0
        keys = _with_room(self._keys, key_states, first, self.columns, self.columns + room)
        values = _with_room(self._values, value_states, first, self.columns, keys.shape[2])
        keys[:, :, first : self.columns] = key_states
        values[:, :, first : self.columns] = value_states
        self._keys, self._values = keys, values
        self.keys, self.values = keys[:, :, : self.columns], values[:, :, : self.columns]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.columns = 0


class SinkRingLayer(_BufferLayer):
    """The first `w_sink` and the latest `w_recent` real tokens of each row."""

    is_sliding = True

    def __init__(self, w_sink: int, w_recent: int, rows: Rows) -> None:
        super().__init__()
        self.w_sink, self.w_recent, self.rows = w_sink, w_recent, rows

    @property
    def slots(self) -> int:
        """Slots in use by the longest row."""
        return min(self.rows.longest, self.w_sink + self.w_recent)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new columns that the window keeps.

        Returns:
            The keys and values that the new queries may see: for one new column the slots in use; for several the slots before
            this update, then the new columns. `slot_positions` and `Rows.new_positions_BT` give the position of each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = 0 if self.keys is None else self.keys.shape[2]
        capacity = min(self.w_sink + self.w_recent, max(self.slots, 2 * held, 64))
        keys = _with_room(self._keys, key_states, held, self.slots, capacity)
        values = _with_room(self._values, value_states, held, self.slots, capacity)
        if key_states.shape[2] == 1:
            self._keep(keys, values)
            self._write_one(keys, values, key_states, value_states)
            return self.keys, self.values
        seen_keys, seen_values = key_states, value_states
        if held:
            seen_keys = torch.cat([self.keys, key_states], dim=2)
            seen_values = torch.cat([self.values, value_states], dim=2)
        self._keep(*self._absorbed(keys, values, key_states, value_states))
        return seen_keys, seen_values

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.keys, self.values = keys[:, :, : self.slots], values[:, :, : self.slots]

    def _write_one(self, keys: Tensor, values: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        if self.rows.shortest == self.rows.longest:
            slot = slot_of(self.rows.longest - 1, self.w_sink, self.w_recent)
            keys[:, :, slot] = key_states[:, :, 0]
            values[:, :, slot] = value_states[:, :, 0]
            return
        slot_B = slot_of(self.rows.after_B - 1, self.w_sink, self.w_recent).to(keys.device)
        row_B = torch.arange(slot_B.shape[0], device=slot_B.device)
        keys[row_B, :, slot_B] = key_states[:, :, 0]
        values[row_B, :, slot_B] = value_states[:, :, 0]

    def _absorbed(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers after many new columns: each slot holds the last position that maps to it, old or new."""
        position_BS = slot_positions(self.rows.after_B, keys.shape[2], self.w_sink, self.w_recent).to(keys.device)
        before_B1 = self.rows.before_B[:, None].to(keys.device)
        first_column_B1 = new_keys.shape[2] - (self.rows.after_B[:, None].to(keys.device) - before_B1)
        column_BS = position_BS - before_B1 + first_column_B1
        is_new_BS = position_BS >= before_B1
        gather = column_BS.clamp(min=0)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        fresh = is_new_BS[:, None, :, None]
        return (
            torch.where(fresh, new_keys.gather(2, gather), keys),
            torch.where(fresh, new_values.gather(2, gather), values),
        )

    def get_seq_length(self) -> int:
        return self.rows.columns

    def get_max_length(self) -> int:
        return self.w_sink + self.w_recent

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise HybridError("cache: transformers' masks ignore sinks. Fix: use this cache with the hybrid classes only")

    def crop(self, tokens_to_remove: int) -> None:
        raise _refused("removing tokens (assisted and prompt-lookup decoding)")


class SplitLayer(CacheLayerMixin):
    """A split layer: a `GrowingLayer` for its full KV heads, and a `SinkRingLayer` for those that stream."""

    is_sliding = False

    def __init__(self, full: GrowingLayer, streaming: SinkRingLayer) -> None:
        super().__init__()
        self.full, self.streaming = full, streaming

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the two parts return unequal numbers of columns, so the layer's view reads them."""
        return key_states, value_states

    @property
    def parts(self) -> list[_BufferLayer]:
        return [self.full, self.streaming]

    def get_seq_length(self) -> int:
        return self.full.get_seq_length()

    def get_max_length(self) -> int:
        return self.full.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.streaming.get_mask_sizes(query_length)


class HybridCache(Cache):
    """One cache for one batch: a `GrowingLayer` per full layer, a `SinkRingLayer` per lazy or sliding layer, a `SplitLayer` per
    split one."""

    def __init__(self, spec: HybridSpec) -> None:
        self.spec = spec
        self.rows = Rows()
        super().__init__(layers=[self._layer(layer) for layer in range(spec.num_layers)])

    def _layer(self, layer: int) -> CacheLayerMixin:
        if self.spec.slides(layer):
            return SinkRingLayer(0, self.spec.sliding_window, self.rows)
        ring = SinkRingLayer(self.spec.w_sink, self.spec.w_recent, self.rows)
        if self.spec.is_lazy(layer):
            return ring
        return SplitLayer(GrowingLayer(), ring) if self.spec.split_heads(layer) else GrowingLayer()

    @property
    def parts(self) -> list[_BufferLayer]:
        """The layers in their order; of a split one, both parts."""
        return [part for layer in self.layers for part in layer.parts]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached columns, padding included, as transformers' generation counts them."""
        return self.rows.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all layers, room for growth included."""
        return sum(part.nbytes for part in self.parts)

    def view_of_pass(self, view: Any) -> Any:
        """The `AttentionView` of a forward pass with this cache, from the model's own; a subclass may observe or replace it."""
        return view

    def reset(self) -> None:
        fresh = Rows()
        for part in self.parts:
            part.reset()
            if isinstance(part, SinkRingLayer):
                part.rows = fresh
        self.rows = fresh

    def crop(self, tokens_to_remove: int) -> None:
        raise _refused("removing tokens (assisted and prompt-lookup decoding)")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _refused("beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _refused("repeating rows of a filled cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _refused("selecting rows of a filled cache")


Position = TypeVar("Position", int, Tensor)


def slot_of(position: Position, w_sink: int, w_recent: int) -> Position:
    """The slot in which a streaming layer keeps the token at `position`: the one rule for every cache with rings."""
    ring = w_sink + (position - w_sink) % w_recent
    if isinstance(position, Tensor):
        return torch.where(position < w_sink, position, ring)
    return position if position < w_sink else ring


def slot_positions(real_B: Tensor, slots: int, w_sink: int, w_recent: int) -> Tensor:
    """Position [B, S] of the token in each slot after `real_B` real tokens; -1 where the slot is empty."""
    slot_S = torch.arange(slots, device=real_B.device)
    last_B1 = real_B[:, None] - 1
    ring_BS = last_B1 - (last_B1 - slot_S) % w_recent
    position_BS = torch.where(slot_S < w_sink, slot_S, ring_BS)
    return torch.where((position_BS <= last_B1) & ((slot_S < w_sink) | (ring_BS >= w_sink)), position_BS, -1)


def _with_room(buffer: Tensor | None, like: Tensor, used: int, needed: int, capacity: int) -> Tensor:
    """A buffer [B, G, capacity, D] that starts with the `used` columns of `buffer`; `buffer` itself if it has room."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    grown = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    if buffer is not None:
        grown[:, :, :used] = buffer[:, :, :used]
    return grown


def _refused(what: str) -> HybridError:
    return HybridError(
        f"cache: {what} is impossible: the ring of a streaming layer has overwritten the tokens it needs. "
        "Fix: use greedy search or sampling"
    )
