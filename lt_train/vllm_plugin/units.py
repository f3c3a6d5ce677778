"""How the KV heads of a layer are distributed over Attention layers of vLLM.

vLLM 0.32 keeps or frees the KV cache of an Attention layer as a whole, and pads or refuses groups whose pages differ in size
(v1/core/kv_cache_utils.py). So where single KV heads stream, every layer becomes several Attention layers of equally many KV heads,
each with its query heads: the units. All heads of a unit stream, or none does.
"""

from dataclasses import dataclass
from math import gcd

from lt_train.hybrid.spec import HybridSpec


@dataclass(frozen=True)
class Unit:
    """KV heads of one layer."""

    heads: tuple[int, ...]
    streams: bool


def heads_of_a_unit(spec: HybridSpec, kv_heads: int) -> int:
    """As many as possible: all heads of a layer where none is split."""
    return gcd(kv_heads, *(len(heads) for _, heads in spec.split_layers))


def units_of_layer(spec: HybridSpec, layer: int, kv_heads: int) -> list[Unit]:
    """The units of a layer of `kv_heads` KV heads; those that stream are last."""
    streaming = spec.streaming_heads(kv_heads)[layer]
    full = tuple(head for head in range(kv_heads) if head not in streaming)
    size = heads_of_a_unit(spec, kv_heads)
    kinds = ((full, False), (streaming, True))
    return [Unit(heads[start : start + size], streams) for heads, streams in kinds for start in range(0, len(heads), size)]


def number_of_units(spec: HybridSpec, kv_heads: int) -> tuple[int, int]:
    """The number of units of all layers, with full attention and streaming."""
    size, streaming = heads_of_a_unit(spec, kv_heads), spec.number_of_streaming_heads(kv_heads)
    return (spec.num_layers * kv_heads - streaming) // size, streaming // size
