"""The picture of a comparison: quality against KV cache, a line for each strategy, with intervals."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_train.evaluation.scores import AnswerScores, Scores
from lt_train.evaluation.seeds import mean_over_seeds
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.schema import FULL, PER_PROMPT
from lt_train.report.comparison_cells import Entry, scores_of
from lt_train.report.results import Result
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, styled
from lt_train.runtime.units import format_tokens
from lt_train.selection.choose import number_by_ratio

PAPERS_STRATEGY, PAPERS_RATIO = "lazy_ratio", 0.5
"""What LightTransfer publishes: half of the layers, by the lazy ratio."""

HEIGHT = 240.0


@styled
def comparison_figure(bases: Sequence[Result], entries: Sequence[Entry], what: str) -> Figure:
    """A line a strategy (dashed: untrained, where some are trained; squares: of KV heads), the base as a band, and a ring around
    the paper's choice.

    Args:
        bases: the base's result, one for each seed.
    """
    figure, (axes,) = new_figure([HEIGHT], left=72)
    base = bases[0]
    _draw_base(axes, scores_of(bases))
    trains = any(entry.trained for entry in entries)
    for trained in (True, False):
        for name in dict.fromkeys(entry.cell.name for entry in entries):
            line = [entry for entry in entries if (entry.cell.name, entry.trained) == (name, trained)]
            if line:
                state = f", {line[0].state}" if trains else ""
                _draw_line(axes, base, line, f"{name}{state}", "-" if trained or not trains else "--")
    for entry in entries:
        paper = (PAPERS_STRATEGY, number_by_ratio(PAPERS_RATIO, entry.result.num_layers))
        if (entry.cell.strategy, entry.cell.num_streaming) == paper:
            label = None if any(line.get_label() == "the paper's choice" for line in axes.lines) else "the paper's choice"
            (ring,) = axes.plot(_kept(base, entry.result), _values(entry.scores)[0], "o", markersize=17, label=label)
            ring.set(markerfacecolor="none", markeredgecolor=COLOURS["ink"], markeredgewidth=1.4, zorder=4)
            note(ring, f"the paper's choice: {PAPERS_STRATEGY}, {PAPERS_RATIO:.0%} of the layers")
    axes.set_title(what)
    axes.set_xlabel(f"KV cache at {format_tokens(KV_TOKENS)} tokens, % of the base's")
    axes.set_xlim(0, 103)
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


def _draw_line(axes: Axes, base: Result, line: Sequence[Entry], label: str, dash: str) -> None:
    line = sorted(line, key=lambda entry: entry.cell.num_streaming)
    values = [_values(entry.scores) for entry in line]
    drawn = axes.errorbar(
        [_kept(base, entry.result) for entry in line],
        [value for value, _, _ in values],
        yerr=[[value - low for value, low, _ in values], [high - value for value, _, high in values]],
        fmt=f"{'s' if line[0].cell.by_head else 'o'}{dash}",
        color=_colour(line[0]),
        markersize=8,
        zorder=3,
        label=label,
    )
    texts = [f"{entry.result.streaming}: {value:.4g}" for entry, (value, _, _) in zip(line, values, strict=True)]
    note(drawn.lines[0], f"{label}: {'; '.join(texts)}")


def _kept(base: Result, result: Result) -> float:
    return 100 * result.kv_bytes / base.kv_bytes


def _values(scores: Sequence[Scores]) -> tuple[float, float, float]:
    """Mean over seeds and ends of its 95 % interval, in the unit of the table; without an interval the mean thrice."""
    unit, mean = 100 if isinstance(scores[0], AnswerScores) else 1, mean_over_seeds(scores)
    low, high = (mean.value, mean.value) if mean.interval is None else (mean.interval.low, mean.interval.high)
    return unit * mean.value, unit * min(low, mean.value), unit * max(high, mean.value)
