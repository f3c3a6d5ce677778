"""Choice of the layers or KV heads that stream, from a recipe's hybrid part."""

from collections.abc import Collection, Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import accumulate
from math import ceil, isfinite

from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.chosen import heads_by_layer
from lt_train.selection.periodic import periodic_layers
from lt_train.selection.profile import LayerProfile
from lt_train.selection.random import random_layers


def choose_spec(hybrid: Hybrid, base: HybridSpec, kv_heads: int, seed: int, profile: LayerProfile | None = None) -> HybridSpec:
    """The spec that the recipe's hybrid part chooses.

    Args:
        base: the spec of the base; only layers with full attention there can stream, and only they count.
        kv_heads: of each layer.
        seed: of the recipe.
        profile: needed by the strategies that score (`profile.SCORED`), not where what streams is named, for `periodic` and
            `random`. Without one as many KV heads as gates would choose are spread evenly over the layers.

    Raises:
        UserError: see `explicit_layers`, `explicit_heads`, `number_that_stream`, `LayerProfile.choose` and
            `LayerProfile.choose_heads`.
    """
    if hybrid.granularity == "layer":
        layers = choose_layers(hybrid, base, seed, profile)
        return HybridSpec(base.num_layers, layers, hybrid.w_sink, hybrid.w_recent, hybrid.sink == "learned").on(base)
    if hybrid.streaming_kv_heads is not None:
        heads_L = explicit_heads(hybrid.streaming_kv_heads, base.num_layers, kv_heads, base.sliding_layers)
    else:
        count = number_that_stream(hybrid, base, kv_heads, profile)
        if profile is None:
            evenly = periodic_layers(count, len(base.full_in_base) * kv_heads)
            heads_L = heads_by_layer(evenly, base.num_layers, kv_heads, base.sliding_layers)
        else:
            heads_L = profile.choose_heads(count)
    return HybridSpec.from_streaming_heads(heads_L, kv_heads, hybrid.w_sink, hybrid.w_recent).on(base)


def choose_layers(hybrid: Hybrid, base: HybridSpec, seed: int, profile: LayerProfile | None = None) -> tuple[int, ...]:
    """The layers, ascending, that the hybrid part of a recipe with granularity layer requests; see `choose_spec`."""
    if hybrid.layers is not None:
        return explicit_layers(hybrid.layers, base.num_layers, base.sliding_layers)
    assert hybrid.strategy is not None, "the schema has one of layers and strategy"
    count = number_that_stream(hybrid, base, 1, profile)
    if hybrid.strategy in ("periodic", "random"):
        return unscored_layers(hybrid.strategy, count, base, seed)
    assert profile is not None, f"{hybrid.strategy} needs scores"
    return profile.choose(hybrid.strategy, count)


def unscored_layers(strategy: str, count: int, base: HybridSpec, seed: int) -> tuple[int, ...]:
    """The `count` layers, ascending, that `periodic` or `random` chooses of those that can stream."""
    of = len(base.full_in_base)
    places = periodic_layers(count, of) if strategy == "periodic" else random_layers(count, of, seed)
    return tuple(base.full_in_base[place] for place in places)


def number_that_stream(hybrid: Hybrid, base: HybridSpec, kv_heads: int, profile: LayerProfile | None = None) -> int:
    """How many layers the recipe's hybrid part lets stream; with granularity kv_head, how many KV heads of all layers.

    Args:
        base: the spec of the base.
        kv_heads: of each layer.
        profile: needed by `max_rise`; without one the fewest layers, one, whose training takes the most memory.

    Raises:
        UserError: none or all would; see `number_by_ratio`, `number_within_kv_budget` and `number_below_rise`.
    """
    if hybrid.layers is not None:
        return len(explicit_layers(hybrid.layers, base.num_layers, base.sliding_layers))
    if hybrid.streaming_kv_heads is not None:
        return sum(map(len, explicit_heads(hybrid.streaming_kv_heads, base.num_layers, kv_heads, base.sliding_layers)))
    unit, of_layer = ("layer", 1) if hybrid.granularity == "layer" else ("KV head", kv_heads)
    units, sliding = len(base.full_in_base) * of_layer, len(base.sliding_layers) * of_layer
    if hybrid.kv_budget is not None:
        beside = sliding * min(base.sliding_window, KV_TOKENS)
        return number_within_kv_budget(hybrid.kv_budget, units, hybrid.w_sink + hybrid.w_recent, unit, beside)
    if hybrid.max_rise is not None:
        if profile is None:
            return 1
        by_head = profile.mean_head_shares if unit == "KV head" else [[share] for share in profile.mean_shares]
        shares = [share for layer in base.full_in_base for share in by_head[layer]]
        return number_below_rise(hybrid.max_rise, shares, unit)
    assert hybrid.lazy_layer_ratio is not None, "the schema has one setting of how many layers stream"
    return number_by_ratio(hybrid.lazy_layer_ratio, units, unit)


def number_within_kv_budget(budget: float, units: int, window: int, unit: str = "layer", beside: int = 0) -> int:
    """The fewest streaming layers with which a sequence of KV_TOKENS tokens takes at most `budget` of full attention's KV cache.

    Args:
        units: layers of the model that can stream, or what else is chosen of equal size. unit: its name.
        beside: tokens that the base's sliding layers cache, with full attention in the others, summed over as many units.

    Raises:
        UserError: even all but one would not be enough.
    """
    total = units * KV_TOKENS + beside
    saved = total * (1 - budget)
    count = max(1, ceil(round(saved / max(KV_TOKENS - window, 1), 6)))
    if count < units:
        return count
    least = 1 - (units - 1) * max(KV_TOKENS - window, 0) / total
    raise UserError(
        f"hybrid.kv_budget: {budget:g}: with all of {units} {unit}s but one streaming, a sequence of {KV_TOKENS:,} tokens "
        f"takes {least:.3g} of full attention's KV cache. Fix: set it to at least {ceil(1000 * least) / 1000:g}, or lower "
        "hybrid.w_recent"
    )


def number_below_rise(max_rise: float, shares: Sequence[float], unit: str = "layer") -> int:
    """The most streaming layers whose shares of the rise add up to at most `max_rise`.

    Args:
        shares: of layers, or of what else is chosen. unit: its name.

    Raises:
        UserError: none has so small a share.
    """
    sums = list(accumulate(sorted(shares)))
    count = sum(total <= max_rise for total in sums[:-1])
    if count:
        return count
    raise UserError(
        f"hybrid.max_rise: {max_rise:g}: the {unit} that loses least by streaming has a share of {sums[0]:.3g} nats. "
        f"Fix: set it to at least {ceil(1000 * sums[0]) / 1000:g}"
    )


def number_by_ratio(ratio: float, units: int, unit: str = "layer") -> int:
    """How many layers stream: `ratio * units`, rounded to the nearest number, a half upwards (0.5 of 7 is 4).

    Args:
        units: layers of the model, or what else is chosen. unit: its name.

    Raises:
        UserError: it would be none, or every one.
    """
    if not isfinite(ratio):
        raise UserError(f"hybrid.lazy_layer_ratio: {ratio:g}: not a finite number. Fix: set it above 0 and below 1")
    # Decimal, because the binary float 0.35 * 10 is not exactly 3.5.
    count = int((Decimal(str(ratio)) * units).quantize(Decimal(1), rounding=ROUND_HALF_UP))
    if 0 < count < units:
        return count
    if units < 2:
        raise UserError(
            f"hybrid.lazy_layer_ratio: {ratio:g}: this model has one {unit}; a hybrid needs one that streams and one that "
            "does not. Fix: choose another model.base"
        )
    which = f"no {unit}" if count <= 0 else f"every {unit}"
    raise UserError(
        f"hybrid.lazy_layer_ratio: {ratio:g}: of {units} {unit}s {count} would stream, {which}. "
        f"Fix: set it from {1 / units:.3g} (1 {unit}) to {1 - 1 / units:.3g} ({units - 1} {unit}s)"
    )


def evenly_spread_layers(ratio: float, num_layers: int) -> tuple[int, ...]:
    """The `periodic` layers of a ratio. Raises UserError: see `number_by_ratio`."""
    return periodic_layers(number_by_ratio(ratio, num_layers), num_layers)


def explicit_layers(layers: Sequence[int], num_layers: int, sliding: Collection[int] = ()) -> tuple[int, ...]:
    """The recipe's own `hybrid.layers`, ascending.

    Args:
        sliding: the layers that have a window in the base.

    Raises:
        UserError: no layer, every layer, a layer twice, a sliding one, or one that is not in the model (layers count from 0).
    """
    if not layers:
        raise UserError("hybrid.layers: []: nothing would stream. Fix: name at least one layer, or set hybrid.lazy_layer_ratio")
    unknown = sorted({layer for layer in layers if not 0 <= layer < num_layers})
    if unknown:
        raise UserError(f"hybrid.layers: {_listed(unknown)} not in this model. Fix: name layers from 0 to {num_layers - 1}")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UserError(f"hybrid.layers: {_listed(twice)} named more than once. Fix: name each layer once")
    if set(layers) & set(sliding):
        raise _have_a_window("hybrid.layers", sorted(set(layers) & set(sliding)), num_layers, sliding)
    if len(layers) == num_layers - len(sliding):
        raise UserError("hybrid.layers: every layer would stream, and no layer could reach beyond the window. Fix: leave one out")
    return tuple(sorted(layers))


def explicit_heads(
    heads_L: Sequence[Sequence[int]], num_layers: int, kv_heads: int, sliding: Collection[int] = ()
) -> list[tuple[int, ...]]:
    """The recipe's own `hybrid.streaming_kv_heads`, ascending in each layer.

    Args:
        sliding: the layers that have a window in the base.

    Raises:
        UserError: not a list for each layer, a head that is not in the model or of a sliding layer, no head, or every head.
    """
    name = "hybrid.streaming_kv_heads"
    if len(heads_L) != num_layers:
        raise UserError(f"{name}: {len(heads_L)} lists, and this model has {num_layers} layers. Fix: write a list for each layer")
    for layer, heads in enumerate(heads_L):
        if unknown := sorted(head for head in heads if head >= kv_heads):
            raise UserError(f"{name}.{layer}: KV head {unknown[0]} is not in this model. Fix: name heads from 0 to {kv_heads - 1}")
    count = sum(map(len, heads_L))
    if count == 0:
        raise UserError(f"{name}: nothing would stream. Fix: name at least one KV head, or set hybrid.lazy_layer_ratio")
    if among := [layer for layer, heads in enumerate(heads_L) if heads and layer in sliding]:
        raise _have_a_window(name, among, num_layers, sliding)
    if count == (num_layers - len(sliding)) * kv_heads:
        raise UserError(f"{name}: every KV head would stream, and none could reach beyond the window. Fix: leave one out")
    return [tuple(sorted(heads)) for heads in heads_L]


def _have_a_window(setting: str, among: Sequence[int], num_layers: int, sliding: Collection[int]) -> UserError:
    full = [layer for layer in range(num_layers) if layer not in sliding]
    return UserError(
        f"{setting}: {_listed(among)} with a window in the base already, and only its full layers can stream. "
        f"Fix: name layers of {full}"
    )


def _listed(layers: Sequence[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))
