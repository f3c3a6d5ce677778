"""The curve of a choice: KV cache against the rise that `gates` predicts, from full attention to every layer streaming.

The shares of what streams add up to the predicted rise, so one profile gives the curve, without trying any hybrid.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, styled, write_png
from lt_train.runtime.units import format_tokens
from lt_train.selection.chosen import describe_streaming
from lt_train.selection.profile import LayerProfile

Point = tuple[float, float]
"""KV cache of a sequence of KV_TOKENS tokens as a fraction of full attention's; predicted rise, in nats per long-reach token."""

HEIGHT = 210.0


def predicted_curve(shares: Sequence[float], window: int, beside: float = 0.0) -> list[Point]:
    """The points of the curve: no unit streams, then the one with the smallest share, then the two smallest, to all of them.

    Args:
        shares: of layers, or of KV heads, which all have equal keys and values.
        window: tokens that a streaming unit keeps.
        beside: see `kept_fraction`.
    """
    rises = accumulate(sorted(shares), initial=0.0)
    return [(kept_fraction(streaming / len(shares), window, beside), rise) for streaming, rise in enumerate(rises)]


def kept_fraction(streaming: float, window: int, beside: float = 0.0) -> float:
    """KV cache as a fraction of the base's, where a fraction `streaming` of the layers or heads streams.

    Args:
        beside: cache of layers that slide in the base, as a multiple of that of its full layers.
    """
    return 1 - streaming * (1 - min(window, KV_TOKENS) / KV_TOKENS) / (1 + beside)


def draw_curve(profile: LayerProfile, chosen: HybridSpec, path: Path) -> None:
    """Write `curve_figure` to a PNG file."""
    write_png(curve_figure(profile, chosen), path)


@styled
def curve_figure(profile: LayerProfile, chosen: HybridSpec) -> Figure:
    """A line for layers, one for single KV heads, and a point for `chosen`; of a profile with scores by `gates`."""
    window = profile.fingerprint.sizes.w_sink + profile.fingerprint.sizes.w_recent
    full = chosen.full_in_base
    layer_shares = [profile.mean_shares[layer] for layer in full]
    head_shares = [share for layer in full for share in profile.mean_head_shares[layer]]
    beside = len(chosen.sliding_layers) * min(chosen.sliding_window, KV_TOKENS) / (len(full) * KV_TOKENS)
    figure, (axes,) = new_figure([HEIGHT], left=72)
    for shares, unit, dash in ((layer_shares, "layers", "-"), (head_shares, "KV heads", "--")):
        curve = predicted_curve(shares, window, beside)
        label = f"{unit} in the order of their shares"
        (line,) = axes.plot(*_in_percent(curve), dash, color=COLOURS["gates"], linewidth=2.4, label=label)
        half = curve[len(curve) // 2]
        note(line, f"{unit}: half of {len(shares)} stream: {half[0]:.1%} of the KV cache, predicted rise {half[1]:.3g} nats")
    streaming = chosen.number_of_streaming_heads(profile.kv_heads) / len(head_shares)
    here = (kept_fraction(streaming, window, beside), profile.predicted_rise(chosen))
    label = f"this run: {describe_streaming(chosen, profile.kv_heads)}"
    (point,) = axes.plot(*_in_percent([here]), "o", color=COLOURS["trained"], zorder=4, label=label)
    note(point, f"{label}: {here[0]:.1%} of the KV cache, predicted rise {here[1]:.3g} nats")
    every = (kept_fraction(1, window, beside), profile.mean_all_streaming("gates"))
    (measured,) = axes.plot(*_in_percent([every]), "s", color=COLOURS["base"], zorder=3, label="every layer streams: measured")
    note(measured, f"every layer streams: {every[0]:.1%} of the KV cache, measured rise {every[1]:.3g} nats")
    axes.set_title("predicted rise on long-reach tokens, nats")
    axes.set_xlabel(f"KV cache at {format_tokens(KV_TOKENS)} tokens, % of full attention's")
    axes.set_xlim(-2, 102)
    axes.axhline(0, color=COLOURS["base"], linewidth=1, zorder=1)
    add_legend(figure)
    return figure


def _in_percent(curve: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * kept for kept, _ in curve], [rise for _, rise in curve]
