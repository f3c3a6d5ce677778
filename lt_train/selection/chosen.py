"""The choice of what streams in a hybrid: as hybrid/layers.json records it, and in words."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import CONVERTED
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json

Chosen = Sequence[int] | Sequence[Sequence[int]]
"""The layers that stream; where layers are split, a list for each layer: its KV heads that stream."""


_BY_VARIANT = TypeAdapter(dict[str, list[NonNegativeInt] | list[list[NonNegativeInt]]])


def read_chosen(path: Path) -> Mapping[str, Chosen]:
    """What hybrid/layers.json records, by variant.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    found = read_json(path, "choice of layers")
    try:
        by_variant = _BY_VARIANT.validate_python(found, strict=True)
    except ValidationError:
        by_variant = {}
    if CONVERTED not in by_variant:
        raise UserError(f"{path}: not a valid choice of layers. Fix: delete it and run again")
    return by_variant


def recorded(spec: HybridSpec, kv_heads: int) -> Chosen:
    """
    Args:
        kv_heads: of each layer.
    """
    return spec.streaming_heads(kv_heads) if spec.split_layers else spec.lazy_layers


def spec_of(chosen: Chosen, num_layers: int, kv_heads: int, w_sink: int, w_recent: int, learned_sinks: bool = False) -> HybridSpec:
    """
    Raises:
        HybridError: see HybridSpec.
    """
    layers = [layer for layer in chosen if isinstance(layer, int)]
    if len(layers) == len(chosen):
        return HybridSpec(num_layers, tuple(layers), w_sink, w_recent, learned_sinks)
    heads_L = [heads for heads in chosen if not isinstance(heads, int)]
    return HybridSpec.from_streaming_heads(heads_L, kv_heads, w_sink, w_recent)


def heads_by_layer(flat: Collection[int], num_layers: int, kv_heads: int, sliding: Collection[int] = ()) -> list[tuple[int, ...]]:
    """By layer, the KV heads in `flat`, which counts them over all layers but those that slide in the base."""
    full = [layer for layer in range(num_layers) if layer not in sliding]
    found = {layer: tuple(h for h in range(kv_heads) if place * kv_heads + h in flat) for place, layer in enumerate(full)}
    return [found.get(layer, ()) for layer in range(num_layers)]


def nearest_number_of_layers(spec: HybridSpec, kv_heads: int) -> int:
    """How many streaming layers have the KV cache nearest to that of `spec`: where layers are split, neither none nor
    all of them."""
    if not spec.split_layers:
        return len(spec.lazy_layers)
    count = int(spec.number_of_streaming_heads(kv_heads) / kv_heads + 0.5)
    return min(max(count, 1), len(spec.full_in_base) - 1)


def streaming_count(spec: HybridSpec, kv_heads: int) -> str:
    """What streams, such as "15 of 30 layers", or "78 of 90 KV heads"; of a base with sliding layers "4 of 8 full layers"."""
    of, full = len(spec.full_in_base), "full " if spec.sliding_layers else ""
    if not spec.split_layers:
        return f"{len(spec.lazy_layers)} of {of} {full}layers"
    return f"{spec.number_of_streaming_heads(kv_heads)} of {of * kv_heads} KV heads{' of full layers' * bool(full)}"


def describe_streaming(spec: HybridSpec, kv_heads: int) -> str:
    """What streams in words, such as "15 of 30 layers stream", or "78 of 90 KV heads stream in 29 layers"."""
    layers = len(spec.lazy_layers) + len(spec.split_layers)
    where = f" in {layers} layer{'s' * (layers > 1)}" if spec.split_layers else ""
    return f"{streaming_count(spec, kv_heads)} stream{where}"


def list_streaming(spec: HybridSpec) -> str:
    """The layers that stream, such as "0, 3", and of split layers the KV heads: "0, 3; of layer 1: 0, 2; of layer 2: 1"."""
    whole = [numbers(spec.lazy_layers)] if spec.lazy_layers else []
    return "; ".join([*whole, *(f"of layer {layer}: {numbers(heads)}" for layer, heads in spec.split_layers)])


def numbers(found: Collection[int]) -> str:
    return ", ".join(map(str, found))
