"""The layer profile as a picture, the same on the report's page and in profile.png: a panel a strategy, a point a layer."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, printable, styled, write_png
from lt_train.selection.chosen import describe_streaming, nearest_number_of_layers, numbers
from lt_train.selection.profile import LayerProfile

MEANINGS = {
    "gates": ("share of the rise of the loss on long-reach tokens when every layer streams", "nats per token"),
    "reach": ("rise of the loss on long-reach tokens when this layer alone streams", "nats per token"),
    "nll": ("rise of the loss on all answer tokens when this layer alone streams", "nats per token"),
    "kl": ("divergence from the full model on answer tokens when this layer alone streams", "nats per token"),
    "lazy_ratio": ("attention of the last queries on sink and recent tokens; higher is lazier", "fraction"),
}
"""Strategy -> what its score is, and its unit."""

_STRIP, _PANEL = 16.0, 130.0
SLIDES = "line"
"""Colour of layers that have a window in the base."""

_ROW, _HIGHEST_STRIP = 8.0, 72.0
"""Of a strip with a row for each KV head."""


def draw_profile(profile: LayerProfile, chosen: HybridSpec, path: Path) -> None:
    """Write `profile_figure` to a PNG file."""
    write_png(profile_figure(profile, chosen), path)


@styled
def profile_figure(profile: LayerProfile, chosen: HybridSpec) -> Figure:
    """Mean and interquartile range of each layer's scores over the samples.

    Colours and the strip on top show `chosen`, what streams in this run: where layers are split, a row for each KV head. The
    background of each panel shows the layers of its own strategy, as many as come nearest to the KV cache of `chosen`.
    """
    rows = profile.kv_heads if chosen.split_layers else 1
    heights = [min(max(_STRIP, _ROW * rows), _HIGHEST_STRIP), *[_PANEL] * len(profile.strategies)]
    figure, (strip, *panels) = new_figure(heights, left=72, title_lines=2)
    streaming = describe_streaming(chosen, rows)
    longest, split = max(10, 54 - len(streaming)), [layer for layer, _ in chosen.split_layers[:1]]
    sizes, name = profile.fingerprint.sizes, printable(Path(profile.fingerprint.model).name) or "model"
    strip.set_title(
        f"{name if len(name) < longest else name[: longest - 2] + '…'}: {streaming}\n"
        f"w_sink {sizes.w_sink}, w_recent {sizes.w_recent}, {len(profile.samples)} samples"
    )
    _draw_strip(strip, chosen, rows)
    for axes, strategy in zip(panels, profile.strategies, strict=True):
        _draw_scores(axes, profile, strategy, chosen, rows)
    panels[-1].set_xlabel("layer")
    panels[-1].set_xlim(-0.6, profile.num_layers - 0.4)
    panels[-1].xaxis.set_major_locator(MaxNLocator(17, steps=[1, 2, 4, 8, 10], integer=True))
    handles = [
        Line2D([], [], color=COLOURS["trained"], marker="o", linestyle="", label="streams in this run"),
        *(Line2D([], [], color=_colour(layer, chosen), marker="o", linestyle="", label="some KV heads stream") for layer in split),
        Line2D([], [], color=COLOURS["base"], marker="o", linestyle="", label="keeps full attention"),
        *(Patch(color=COLOURS[SLIDES], label="slides in the base") for _ in chosen.sliding_layers[:1]),
        Patch(color=COLOURS["tint"], label="would stream by this score"),
        Line2D([], [], color=COLOURS["base"], linewidth=3, alpha=0.55, label="interquartile range"),
    ]
    add_legend(figure, handles, columns=2)
    return figure


def _draw_strip(axes: Axes, chosen: HybridSpec, rows: int) -> None:
    """A bar for each layer, in `rows` parts, of its KV heads, the first on top."""
    layers = range(chosen.num_layers)
    for row in range(rows):
        streaming = [row in heads for heads in chosen.streaming_heads(rows)]
        slides = [layer in chosen.sliding_layers for layer in layers]
        colours = [
            COLOURS[SLIDES if slid else "trained" if streams else "base"] for slid, streams in zip(slides, streaming, strict=True)
        ]
        bars = axes.bar(layers, 0.92 / rows if rows > 1 else 1.0, 0.84, bottom=1 - (row + 1) / rows, color=colours)
        for layer, bar in enumerate(bars):
            which = f"layer {layer}" + (f", KV head {row}" if rows > 1 else "")
            kept = "slides in the base" if slides[layer] else "keeps full attention"
            note(bar, f"{which} {'streams' if streaming[layer] else kept}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _draw_scores(axes: Axes, profile: LayerProfile, strategy: str, chosen: HybridSpec, rows: int) -> None:
    layers = profile.full_in_base
    scores_SL = np.array(profile.scores[strategy])[:, layers]
    mean_L = scores_SL.mean(axis=0)
    low_L, high_L = np.quantile(scores_SL, [0.25, 0.75], axis=0)
    by_this = profile.choose(strategy, nearest_number_of_layers(chosen, rows))
    for layer, mean, low, high in zip(layers, mean_L, low_L, high_L, strict=True):
        background = axes.axvspan(
            layer - 0.5, layer + 0.5, color=COLOURS["tint" if layer in by_this else "card"], linewidth=0, zorder=0
        )
        note(
            background,
            f"layer {layer}: {mean:.4g} (interquartile range over {len(profile.samples)} samples {low:.4g} to "
            f"{high:.4g}); {_state(layer, chosen)} in this run",
        )
    colours, size = [_colour(layer, chosen) for layer in layers], min(8.0, 320 / profile.num_layers)
    axes.vlines(layers, low_L, high_L, color=colours, linewidth=size / 3, alpha=0.55, zorder=2)
    axes.scatter(layers, mean_L, s=size**2, color=colours, zorder=3)
    if strategy != "lazy_ratio":  # a rise is measured from 0
        axes.vlines(layers, 0, mean_L, color=colours, linewidth=1, zorder=1)
        axes.axhline(0, color=COLOURS["base"], linewidth=1, zorder=1)
    meaning, unit = MEANINGS[strategy]
    if strategy in profile.samples[0].all_streaming:
        meaning += f" (all layers: {profile.mean_all_streaming(strategy):+.3g})"
    axes.set_title(textwrap.fill(f"{strategy}: {meaning}", 58))
    axes.set_ylabel(unit)


def _colour(layer: int, chosen: HybridSpec) -> str:
    if chosen.split_heads(layer):
        return COLOURS["converted"]
    return COLOURS["trained" if chosen.is_lazy(layer) else "base"]


def _state(layer: int, chosen: HybridSpec) -> str:
    if heads := chosen.split_heads(layer):
        return f"streams in KV head{'s' * (len(heads) > 1)} {numbers(heads)}"
    return "streams" if chosen.is_lazy(layer) else "keeps full attention"
