"""The layer profile as a picture: one panel a strategy, one bar a layer, chosen layers in colour."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lt_train.files import replacing
from lt_train.selection.profile import LayerProfile

_STREAMS, _FULL, _INK, _FAINT = "#1b9e8a", "#c9ced6", "#2b3440", "#8a94a3"
_TITLES = {
    "reach": ("reach", "loss rise on long-reach tokens when this layer alone streams"),
    "nll": ("nll", "loss rise on all answer tokens when this layer alone streams"),
    "lazy_ratio": ("lazy ratio", "attention on sink and recent tokens"),
}
_UNITS = {"reach": "nats per token", "nll": "nats per token", "lazy_ratio": "share of attention"}


def draw_profile(profile: LayerProfile, chosen: Collection[int], path: Path) -> None:
    """Write a PNG of the profile's scores.

    Each panel colours the layers that its own strategy would let stream, as many as `chosen` has; the strip on top
    shows `chosen`, the layers that stream in this run. Bars are means over samples, whiskers their middle half.
    """
    panels = profile.strategies
    figure = Figure(
        figsize=(_width(profile.num_layers), 1.1 + 2.5 * len(panels)), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    strip, *axes = figure.subplots(
        1 + len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [0.16] + [1.0] * len(panels)}
    )[:, 0]
    figure.suptitle(_heading(profile, chosen), x=0.01, ha="left", fontsize=11, color=_INK)
    _draw_strip(strip, profile.num_layers, chosen)
    for axis, strategy in zip(axes, panels, strict=True):
        _draw_scores(axis, profile, strategy, profile.choose(strategy, len(chosen)))
    _label_layers(axes[-1], profile.num_layers)
    _draw_legend(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _width(num_layers: int) -> float:
    return min(14.0, max(7.0, 3.0 + 0.17 * num_layers))


def _heading(profile: LayerProfile, chosen: Collection[int]) -> str:
    sizes = profile.fingerprint.sizes
    name = Path(profile.fingerprint.model).name or "model"
    counts = f"{len(chosen)} of {profile.num_layers} layers stream"
    return f"{name}: {counts} (w_sink {sizes.w_sink}, w_recent {sizes.w_recent}; {len(profile.samples)} samples)"


def _draw_strip(axis: Axes, num_layers: int, chosen: Collection[int]) -> None:
    colours = [_STREAMS if layer in chosen else _FULL for layer in range(num_layers)]
    axis.bar(range(num_layers), 1.0, width=0.86, color=colours)
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
    axis.bar(layers, mean_L, width=0.86, color=[_STREAMS if layer in chosen else _FULL for layer in layers])
    axis.vlines(layers, low_L, high_L, color=_INK, linewidth=1.1)
    name, meaning = _TITLES[strategy]
    axis.set_title(f"{name}: {meaning}", loc="left", fontsize=9.5, color=_INK)
    axis.set_ylabel(_UNITS[strategy], fontsize=8.5, color=_INK)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(axis="y", color="#eceff3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)


def _label_layers(axis: Axes, num_layers: int) -> None:
    step = 1 if num_layers <= 40 else 2
    axis.set_xticks(range(0, num_layers, step))
    axis.set_xlim(-0.6, num_layers - 0.4)
    axis.set_xlabel("layer", fontsize=9, color=_INK)


def _draw_legend(figure: Figure) -> None:
    handles = [
        Patch(color=_STREAMS, label="streams: chosen by this score"),
        Patch(color=_FULL, label="keeps full attention"),
        Line2D([], [], color=_INK, linewidth=1.1, label="middle half of the samples"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
