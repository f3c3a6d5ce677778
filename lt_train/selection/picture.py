"""The layer profile as a picture, the same on the report's page and in profile.png: a panel a strategy, a point a layer."""

import textwrap
from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, printable, styled, write_png
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


def draw_profile(profile: LayerProfile, chosen: Collection[int], path: Path) -> None:
    """Write `profile_figure` to a PNG file."""
    write_png(profile_figure(profile, chosen), path)


@styled
def profile_figure(profile: LayerProfile, chosen: Collection[int]) -> Figure:
    """Mean and interquartile range of each layer's scores over the samples.

    Colours and the strip on top show `chosen`, the layers that stream in this run. The background of each panel shows the same
    number of layers chosen by its own strategy.
    """
    figure, (strip, *panels) = new_figure([_STRIP, *[_PANEL] * len(profile.strategies)], left=72, title_lines=2)
    sizes, name = profile.fingerprint.sizes, printable(Path(profile.fingerprint.model).name) or "model"
    strip.set_title(
        f"{name if len(name) < 32 else name[:30] + '…'}: {len(chosen)} of {profile.num_layers} layers stream\n"
        f"w_sink {sizes.w_sink}, w_recent {sizes.w_recent}, {len(profile.samples)} samples"
    )
    _draw_strip(strip, profile.num_layers, chosen)
    for axes, strategy in zip(panels, profile.strategies, strict=True):
        _draw_scores(axes, profile, strategy, chosen)
    panels[-1].set_xlabel("layer")
    panels[-1].set_xlim(-0.6, profile.num_layers - 0.4)
    panels[-1].xaxis.set_major_locator(MaxNLocator(17, steps=[1, 2, 4, 8, 10], integer=True))
    handles = [
        Line2D([], [], color=COLOURS["trained"], marker="o", linestyle="", label="streams in this run"),
        Line2D([], [], color=COLOURS["base"], marker="o", linestyle="", label="keeps full attention"),
        Patch(color=COLOURS["tint"], label="would stream by this score"),
        Line2D([], [], color=COLOURS["base"], linewidth=3, alpha=0.55, label="interquartile range"),
    ]
    add_legend(figure, handles, columns=2)
    return figure


def _draw_strip(axes: Axes, num_layers: int, chosen: Collection[int]) -> None:
    bars = axes.bar(range(num_layers), 1.0, width=0.84, color=[_colour(layer, chosen) for layer in range(num_layers)])
    for layer, bar in enumerate(bars):
        note(bar, f"layer {layer} {_state(layer, chosen)}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _draw_scores(axes: Axes, profile: LayerProfile, strategy: str, chosen: Collection[int]) -> None:
    scores_SL = np.array(profile.scores[strategy])
    mean_L = scores_SL.mean(axis=0)
    low_L, high_L = np.quantile(scores_SL, [0.25, 0.75], axis=0)
    by_this, layers = profile.choose(strategy, len(chosen)), range(profile.num_layers)
    for layer in layers:
        background = axes.axvspan(
            layer - 0.5, layer + 0.5, color=COLOURS["tint" if layer in by_this else "card"], linewidth=0, zorder=0
        )
        note(
            background,
            f"layer {layer}: {mean_L[layer]:.4g} (interquartile range over {len(profile.samples)} samples {low_L[layer]:.4g} to "
            f"{high_L[layer]:.4g}); {_state(layer, chosen)} in this run",
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


def _colour(layer: int, chosen: Collection[int]) -> str:
    return COLOURS["trained" if layer in chosen else "base"]


def _state(layer: int, chosen: Collection[int]) -> str:
    return "streams" if layer in chosen else "keeps full attention"
