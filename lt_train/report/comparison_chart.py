"""The picture of a comparison: quality against KV cache, a line for each strategy, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_train.evaluation.scores import AnswerScores, Scores
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.schema import PER_PROMPT
from lt_train.report.results import BY_HEAD, Result
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, styled
from lt_train.runtime.units import format_tokens
from lt_train.selection.choose import number_by_ratio

PAPERS_STRATEGY, PAPERS_RATIO = "lazy_ratio", 0.5
"""What LightTransfer publishes: half of the layers, by the lazy ratio."""

HEIGHT = 240.0


@dataclass(frozen=True)
class Point:
    """
    Attributes:
        streaming: how many layers stream, or have the KV cache of the KV heads that do.
    """

    strategy: str
    streaming: int
    trained: bool
    result: Result
    by_head: bool = False

    @property
    def name(self) -> str:
        return f"{self.strategy}{BY_HEAD if self.by_head else ''}"

    @property
    def colour(self) -> str:
        others = {PER_PROMPT: "converted", "full": "ink"}
        return COLOURS["incorrect" if self.by_head else others.get(self.strategy, self.strategy)]


@styled
def comparison_figure(base: Result, points: Sequence[Point], what: str) -> Figure:
    """A line a strategy (dashed: untrained, where some are trained; squares: of KV heads), the base as a band, and a ring around
    the paper's choice."""
    figure, (axes,) = new_figure([HEIGHT], left=72)
    _draw_base(axes, base)
    trains = any(point.trained for point in points)
    for trained in (True, False):
        for name in dict.fromkeys(point.name for point in points):
            line = [point for point in points if (point.name, point.trained) == (name, trained)]
            if line:
                state = f", {'trained' if trained else 'untrained'}" if trains else ""
                _draw_line(axes, base, line, f"{name}{state}", "-" if trained or not trains else "--")
    for point in points:
        if (point.strategy, point.streaming) == (PAPERS_STRATEGY, number_by_ratio(PAPERS_RATIO, point.result.num_layers)):
            label = None if any(line.get_label() == "the paper's choice" for line in axes.lines) else "the paper's choice"
            (ring,) = axes.plot(_kept(base, point.result), _values(point.result.scores)[0], "o", markersize=17, label=label)
            ring.set(markerfacecolor="none", markeredgecolor=COLOURS["ink"], markeredgewidth=1.4, zorder=4)
            note(ring, f"the paper's choice: {PAPERS_STRATEGY}, {PAPERS_RATIO:.0%} of the layers")
    axes.set_title(what)
    axes.set_xlabel(f"KV cache at {format_tokens(KV_TOKENS)} tokens, % of the base's")
    axes.set_xlim(0, 103)
    add_legend(figure, columns=2)
    return figure


def _draw_base(axes: Axes, base: Result) -> None:
    value, low, high = _values(base.scores)
    axes.axhspan(low, high, color=COLOURS["base"], alpha=0.18, linewidth=0, zorder=0)
    line = axes.axhline(value, color=COLOURS["base"], linewidth=1.4, zorder=1, label="base, 95 % interval")
    note(line, f"base: {value:.4g} [{low:.4g}, {high:.4g}]")


def _draw_line(axes: Axes, base: Result, line: Sequence[Point], label: str, dash: str) -> None:
    line = sorted(line, key=lambda point: point.streaming)
    values = [_values(point.result.scores) for point in line]
    drawn = axes.errorbar(
        [_kept(base, point.result) for point in line],
        [value for value, _, _ in values],
        yerr=[[value - low for value, low, _ in values], [high - value for value, _, high in values]],
        fmt=f"{'s' if line[0].by_head else 'o'}{dash}",
        color=line[0].colour,
        markersize=8,
        zorder=3,
        label=label,
    )
    texts = [f"{point.result.streaming}: {value:.4g}" for point, (value, _, _) in zip(line, values, strict=True)]
    note(drawn.lines[0], f"{label}: {'; '.join(texts)}")


def _kept(base: Result, result: Result) -> float:
    return 100 * result.kv_bytes / base.kv_bytes


def _values(scores: Scores) -> tuple[float, float, float]:
    """Value and ends of its 95 % interval, in the unit of the table; without an interval the value thrice."""
    unit = 100 if isinstance(scores, AnswerScores) else 1
    value, span = scores.mean.value, scores.interval
    low, high = (value, value) if span is None else (span.low, span.high)
    return unit * value, unit * min(low, value), unit * max(high, value)
