"""Choice of the layers that stream, from a recipe's hybrid part."""

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import accumulate
from math import ceil

from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.periodic import periodic_layers
from lt_train.selection.profile import LayerProfile
from lt_train.selection.random import random_layers


def choose_layers(hybrid: Hybrid, num_layers: int, seed: int, profile: LayerProfile | None = None) -> tuple[int, ...]:
    """The layers, ascending, that the recipe's hybrid part requests; `seed` is the recipe's.

    `profile` is needed by the strategies that score (`profile.SCORED`), not for explicit layers, `periodic` and `random`.

    Raises:
        UserError: see `explicit_layers`, `number_by_ratio` and `LayerProfile.choose`.
    """
    if hybrid.layers is not None:
        return explicit_layers(hybrid.layers, num_layers)
    assert hybrid.strategy is not None, "the schema has one of layers and strategy"
    count = number_that_stream(hybrid, num_layers, profile)
    if hybrid.strategy == "periodic":
        return periodic_layers(count, num_layers)
    if hybrid.strategy == "random":
        return random_layers(count, num_layers, seed)
    assert profile is not None, f"{hybrid.strategy} needs scores"
    return profile.choose(hybrid.strategy, count)


def number_that_stream(hybrid: Hybrid, num_layers: int, profile: LayerProfile | None = None) -> int:
    """How many layers the recipe's hybrid part lets stream.

    Args:
        profile: needed by `max_rise`; without one the fewest layers, one, whose training takes the most memory.

    Raises:
        UserError: none or all would; see `number_by_ratio`, `number_within_kv_budget` and `number_below_rise`.
    """
    if hybrid.layers is not None:
        return len(explicit_layers(hybrid.layers, num_layers))
    if hybrid.kv_budget is not None:
        return number_within_kv_budget(hybrid.kv_budget, num_layers, hybrid.w_sink + hybrid.w_recent)
    if hybrid.max_rise is not None:
        return 1 if profile is None else number_below_rise(hybrid.max_rise, profile.mean_shares)
    assert hybrid.lazy_layer_ratio is not None, "the schema has one setting of how many layers stream"
    return number_by_ratio(hybrid.lazy_layer_ratio, num_layers)


def number_within_kv_budget(budget: float, num_layers: int, window: int) -> int:
    """The fewest streaming layers with which a sequence of KV_TOKENS tokens takes at most `budget` of full attention's KV cache.

    Raises:
        UserError: even all layers but one would not be enough.
    """
    saved = num_layers * KV_TOKENS * (1 - budget)
    count = max(1, ceil(round(saved / max(KV_TOKENS - window, 1), 6)))
    if count < num_layers:
        return count
    least = 1 - (num_layers - 1) * max(KV_TOKENS - window, 0) / (num_layers * KV_TOKENS)
    raise UserError(
        f"hybrid.kv_budget: {budget:g}: with all of {num_layers} layers but one streaming, a sequence of {KV_TOKENS:,} tokens "
        f"takes {least:.3g} of full attention's KV cache. Fix: set it to at least {ceil(1000 * least) / 1000:g}, or lower "
        "hybrid.w_recent"
    )


def number_below_rise(max_rise: float, share_L: Sequence[float]) -> int:
    """The most streaming layers whose shares of the rise add up to at most `max_rise`.

    Raises:
        UserError: no layer has so small a share.
    """
    sums = list(accumulate(sorted(share_L)))
    count = sum(total <= max_rise for total in sums[:-1])
    if count:
        return count
    raise UserError(
        f"hybrid.max_rise: {max_rise:g}: the layer that loses least by streaming has a share of {sums[0]:.3g} nats. "
        f"Fix: set it to at least {ceil(1000 * sums[0]) / 1000:g}"
    )


def number_by_ratio(ratio: float, num_layers: int) -> int:
    """How many layers stream: `ratio * num_layers`, rounded to the nearest number, a half upwards (0.5 of 7 is 4).

    Raises:
        UserError: it would be no layer, or every layer.
    """
    # Decimal, because the binary float 0.35 * 10 is not exactly 3.5.
    count = int((Decimal(str(ratio)) * num_layers).quantize(Decimal(1), rounding=ROUND_HALF_UP))
    if 0 < count < num_layers:
        return count
    if num_layers < 2:
        raise UserError(
            f"hybrid.lazy_layer_ratio: {ratio:g}: this model has one layer; a hybrid needs one that streams and one that does not. "
            "Fix: choose another model.base"
        )
    which = "no layer" if count == 0 else "every layer"
    raise UserError(
        f"hybrid.lazy_layer_ratio: {ratio:g}: of {num_layers} layers {count} would stream, {which}. "
        f"Fix: set it from {1 / num_layers:.3g} (1 layer) to {1 - 1 / num_layers:.3g} ({num_layers - 1} layers)"
    )


def evenly_spread_layers(ratio: float, num_layers: int) -> tuple[int, ...]:
    """The `periodic` layers of a ratio. Raises UserError: see `number_by_ratio`."""
    return periodic_layers(number_by_ratio(ratio, num_layers), num_layers)


def explicit_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The recipe's own `hybrid.layers`, ascending.

    Raises:
        UserError: no layer, every layer, a layer twice, or one that is not in the model (layers count from 0).
    """
    if not layers:
        raise UserError("hybrid.layers: []: nothing would stream. Fix: name at least one layer, or set hybrid.lazy_layer_ratio")
    unknown = sorted({layer for layer in layers if not 0 <= layer < num_layers})
    if unknown:
        raise UserError(f"hybrid.layers: {_listed(unknown)} not in this model. Fix: name layers from 0 to {num_layers - 1}")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UserError(f"hybrid.layers: {_listed(twice)} named more than once. Fix: name each layer once")
    if len(layers) == num_layers:
        raise UserError("hybrid.layers: every layer would stream, and no layer could reach beyond the window. Fix: leave one out")
    return tuple(sorted(layers))


def _listed(layers: Sequence[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))
