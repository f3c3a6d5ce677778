"""The picture of a comparison: quality against KV cache, a line for each strategy, with intervals."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_train.evaluation.scores import AnswerScores, Scores
from lt_train.evaluation.seeds import mean_over_seeds
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.schema import FULL, PER_PROMPT
from lt_train.report.comparison_cells import STATES, Entry, scores_of
from lt_train.report.results import Result
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, styled
from lt_train.runtime.units import format_tokens
from lt_train.selection.choose import number_by_ratio

PAPERS_STRATEGY, PAPERS_RATIO = "lazy_ratio", 0.5
"""What LightTransfer publishes: half of the layers, by the lazy ratio."""

HEIGHT, MARKER = 240.0, 8.0
"""Pixels: of the panel, and of the marker of a point."""

X_LIMIT = 103.0


@dataclass(frozen=True)
class Point:
    """An entry in the picture: its mean, the ends of its interval, and the fraction of the base's KV cache in percent.

    Attributes:
        line: the label of the line through it.
        x: where it is drawn, beside the points of other lines that it would hide.
    """

    entry: Entry
    line: str
    value: float
    low: float
    high: float
    kept: float
    x: float


@styled
def comparison_figure(bases: Sequence[Result], entries: Sequence[Entry], what: str) -> Figure:
    """A line a strategy (dashed: untrained, where some are trained; dotted: distilled; squares: of KV heads), the base as a band,
    and a ring around the paper's choice.

    Args:
        bases: the base's result, one for each seed.
    """
    figure, (axes,) = new_figure([HEIGHT], left=72)
    _draw_base(axes, scores_of(bases))
    trains = any(entry.trained for entry in entries)
    points = _side_by_side(_points(bases[0], entries, trains), axes)
    for line in dict.fromkeys(point.line for point in points):
        _draw_line(axes, [point for point in points if point.line == line], trains)
    for point in points:
        cell, result = point.entry.cell, point.entry.result
        if (cell.strategy, cell.num_streaming) == (PAPERS_STRATEGY, number_by_ratio(PAPERS_RATIO, result.num_layers)):
            label = None if any(line.get_label() == "the paper's choice" for line in axes.lines) else "the paper's choice"
            (ring,) = axes.plot(point.x, point.value, "o", markersize=17, label=label)
            ring.set(markerfacecolor="none", markeredgecolor=COLOURS["ink"], markeredgewidth=1.4, zorder=4)
            note(ring, f"the paper's choice: {PAPERS_STRATEGY}, {PAPERS_RATIO:.0%} of the layers")
    axes.set_title(what)
    axes.set_xlabel(f"KV cache at {format_tokens(KV_TOKENS)} tokens, % of the base's")
    axes.set_xlim(0, X_LIMIT)
    add_legend(figure, columns=2)
    return figure


def _colour(entry: Entry) -> str:
    others = {PER_PROMPT: "converted", FULL: "ink"}
    return COLOURS["incorrect" if entry.cell.by_head else others.get(entry.cell.strategy, entry.cell.strategy)]


def _draw_base(axes: Axes, scores: Sequence[Scores]) -> None:
    value, low, high = _values(scores)
    axes.axhspan(low, high, color=COLOURS["base"], alpha=0.18, linewidth=0, zorder=0)
    line = axes.axhline(value, color=COLOURS["base"], linewidth=1.4, zorder=1, label="base, 95 % interval")
    note(line, f"base: {value:.4g} [{low:.4g}, {high:.4g}]")


def _points(base: Result, entries: Sequence[Entry], trains: bool) -> list[Point]:
    """The points of trained hybrids, then the others."""
    points = []
    for entry in sorted(entries, key=lambda entry: (not entry.trained, entry.cell.num_streaming)):
        kept = 100 * entry.result.kv_bytes / base.kv_bytes
        line = f"{entry.cell.name}, {entry.state}" if trains else entry.cell.name
        points.append(Point(entry, line, *_values(entry.scores), kept, kept))
    return points


def _side_by_side(points: Sequence[Point], axes: Axes) -> list[Point]:
    """The points line by line, those of one KV cache beside each other where their markers or intervals overlap."""
    ends = [*axes.get_ylim(), *(end for point in points for end in (point.low, point.high))]
    radius = MARKER / 2 / axes.bbox.height * (max(ends) - min(ends))
    marker = MARKER / axes.bbox.width * X_LIMIT
    free = min((right - left for left, right in pairwise(sorted({point.kept for point in points}))), default=X_LIMIT)
    order = list(dict.fromkeys(point.line for point in points))
    placed: list[Point] = []
    for kept in dict.fromkeys(point.kept for point in points):
        for group in _overlapping([point for point in points if point.kept == kept], radius):
            lines = sorted({point.line for point in group}, key=order.index)
            step = min(1.25 * marker, 3 * marker / len(lines), 0.7 * free / len(lines))
            placed += [replace(each, x=kept + step * (lines.index(each.line) - (len(lines) - 1) / 2)) for each in group]
    return sorted(placed, key=lambda point: (order.index(point.line), point.kept))


def _overlapping(points: Iterable[Point], radius: float) -> Iterator[list[Point]]:
    """Groups of points whose markers, of that radius, or intervals overlap vertically."""
    group: list[Point] = []
    top = -inf
    for point in sorted(points, key=lambda point: min(point.low, point.value - radius)):
        if group and min(point.low, point.value - radius) > top:
            yield group
            group = []
        group.append(point)
        top = max(top, point.high, point.value + radius)
    yield group


def _draw_line(axes: Axes, line: Sequence[Point], trains: bool) -> None:
    first = line[0].entry
    dash = ":" if first.state == STATES["distilled"] else "--" if trains and not first.trained else "-"
    drawn = axes.errorbar(
        [point.x for point in line],
        [point.value for point in line],
        yerr=[[point.value - point.low for point in line], [point.high - point.value for point in line]],
        fmt=f"{'s' if first.cell.by_head else 'o'}{dash}",
        color=_colour(first),
        markersize=MARKER,
        zorder=3,
        label=line[0].line,
    )
    texts = [f"{point.entry.result.streaming}: {point.value:.4g}" for point in line]
    note(drawn.lines[0], f"{line[0].line}: {'; '.join(texts)}")


def _values(scores: Sequence[Scores]) -> tuple[float, float, float]:
    """Mean over seeds and ends of its 95 % interval, in the unit of the table; without an interval the mean thrice."""
    unit, mean = 100 if isinstance(scores[0], AnswerScores) else 1, mean_over_seeds(scores)
    low, high = (mean.value, mean.value) if mean.interval is None else (mean.interval.low, mean.interval.high)
    return unit * mean.value, unit * min(low, mean.value), unit * max(high, mean.value)
