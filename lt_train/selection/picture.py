"""The layer profile as a picture: one panel a strategy, one point a layer, chosen layers marked."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lt_train.runtime.files import replacing
from lt_train.selection.profile import LayerProfile

_STREAMS, _FULL, _TINT = "#159e87", "#76869b", "#dff3ef"
_INK, _FAINT, _GRID = "#2b3440", "#a9b2bf", "#eceff3"
_MEANINGS = {
    "reach": "rise of the loss on long-reach tokens when this layer alone streams",
    "nll": "rise of the loss on all answer tokens when this layer alone streams",
    "lazy_ratio": "attention of the last queries on sink and recent tokens (the more, the lazier)",
}
_UNITS = {"reach": "nats per token", "nll": "nats per token", "lazy_ratio": "share of attention"}
_PANEL_INCHES, _STRIP_INCHES, _FRAME_INCHES = 1.95, 0.26, 1.4


def draw_profile(profile: LayerProfile, chosen: Collection[int], path: Path) -> None:
    """Write a PNG of the profile's scores.

    The strip on top shows `chosen`, the layers that stream in this run. Each panel marks the layers that its own strategy
    would let stream, as many as `chosen` has. Points are means over samples, whiskers their middle half.
    """
    panels = profile.strategies
    size = (_width(profile.num_layers), _FRAME_INCHES + _PANEL_INCHES * len(panels))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    heights = [_STRIP_INCHES] + [_PANEL_INCHES] * len(panels)
    strip, *axes = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    figure.suptitle(_heading(profile, chosen), x=0.01, ha="left", fontsize=11, color=_INK)
    _draw_strip(strip, profile.num_layers, chosen)
    for axis, strategy in zip(axes, panels, strict=True):
        _draw_scores(axis, profile, strategy, profile.choose(strategy, len(chosen)))
    _label_layers(axes[-1], profile.num_layers)
    _draw_legend(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _width(num_layers: int) -> float:
    return min(14.0, max(8.0, 3.0 + 0.17 * num_layers))


def _heading(profile: LayerProfile, chosen: Collection[int]) -> str:
    sizes = profile.fingerprint.sizes
    name = Path(profile.fingerprint.model).name or "model"
    counts = f"{len(chosen)} of {profile.num_layers} layers stream"
    return f"{name}: {counts}\nw_sink {sizes.w_sink}, w_recent {sizes.w_recent}, {len(profile.samples)} samples"


def _draw_strip(axis: Axes, num_layers: int, chosen: Collection[int]) -> None:
    colours = [_STREAMS if layer in chosen else _FULL for layer in range(num_layers)]
    axis.bar(range(num_layers), 1.0, width=0.84, color=colours)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.set_ylabel("this run", rotation=0, ha="right", va="center", fontsize=9, color=_INK)
    axis.tick_params(bottom=False)
    axis.spines[:].set_visible(False)


def _draw_scores(axis: Axes, profile: LayerProfile, strategy: str, chosen: Collection[int]) -> None:
    scores_SL = np.array(profile.scores[strategy])
    mean_L = scores_SL.mean(axis=0)
    low_L, high_L = np.quantile(scores_SL, [0.25, 0.75], axis=0)
    layers = range(profile.num_layers)
    colours = [_STREAMS if layer in chosen else _FULL for layer in layers]
    for layer in chosen:
        axis.axvspan(layer - 0.5, layer + 0.5, color=_TINT, linewidth=0, zorder=0)
    axis.vlines(layers, low_L, high_L, color=colours, linewidth=2.2, alpha=0.55, zorder=2)
    axis.scatter(layers, mean_L, s=30, color=colours, linewidth=0, zorder=3)
    if strategy != "lazy_ratio":  # a rise has a zero worth measuring from
        axis.vlines(layers, 0, mean_L, color=colours, linewidth=1.0, zorder=1)
        axis.axhline(0, color=_FAINT, linewidth=0.9, zorder=1)
    _label_panel(axis, profile, strategy)


def _label_panel(axis: Axes, profile: LayerProfile, strategy: str) -> None:
    axis.set_title(f"{strategy}: {_MEANINGS[strategy]}", loc="left", fontsize=9.5, color=_INK)
    if strategy != "lazy_ratio":
        every_layer = np.mean([sample.all_streaming[strategy] for sample in profile.samples])
        axis.set_title(f"all layers streaming: {every_layer:+.2g}", loc="right", fontsize=8.5, color=_FULL)
    axis.set_ylabel(_UNITS[strategy], fontsize=8.5, color=_INK)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)


def _label_layers(axis: Axes, num_layers: int) -> None:
    axis.set_xticks(range(0, num_layers, 1 if num_layers <= 40 else 2))
    axis.set_xlim(-0.6, num_layers - 0.4)
    axis.set_xlabel("layer", fontsize=9, color=_INK)


def _draw_legend(figure: Figure) -> None:
    handles = [
        Patch(color=_STREAMS, label="streams (in panels: by this score)"),
        Patch(color=_FULL, label="keeps full attention"),
        Line2D([], [], color=_INK, marker="o", markersize=5, linestyle="", label="mean over samples"),
        Line2D([], [], color=_INK, linewidth=2.2, alpha=0.55, label="middle half of samples"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, columnspacing=1.4)
