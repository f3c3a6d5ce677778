"""The charts that compare variants: accuracy against tokens, and how long correct, incorrect and truncated answers are."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lt_train.evaluation.records import SampleRecord
from lt_train.evaluation.scores import AnswerScores
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.schema import Strategy, converted_by
from lt_train.report.contents import EvaluatedVariant
from lt_train.report.formatting import percent
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, printable, styled, to_svg
from lt_train.runtime.units import format_tokens

BINS_PER_DOUBLING = 4
OUTCOMES = {"correct": "trained", "incorrect": "incorrect", "truncated": "base"}
"""Outcome of a sample -> the name of its colour."""
VARIANT_COLOURS = {
    BASE: "base",
    CONVERTED: "converted",
    TRAINED: "trained",
    **{converted_by(strategy): strategy for strategy in get_args(Strategy)},
}
MARKERS = "osD^"
DASHES = ("-", "--", ":", "-.")
"""Runs differ by markers and dashes, variants by colours."""
HEIGHT = 210.0


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        return Markup(to_svg(self.figure, self.title))


def colour(variant: str) -> str:
    """The name of a variant's colour in the palette."""
    return VARIANT_COLOURS.get(variant, "lazy_ratio")


def name(each: EvaluatedVariant, several_runs: bool) -> str:
    return f"{each.run}: {each.result.label}" if several_runs else each.result.label


def below(each: EvaluatedVariant) -> bool:
    """Whether to draw it below the others, and larger: the base stays visible where a hybrid is as good."""
    return each.result.variant == BASE


@styled
def accuracy_by_tokens(rows: Sequence[EvaluatedVariant], several_runs: bool) -> Chart:
    """One point a variant: accuracy with its 95 % interval over the mean number of tokens of an answer."""
    figure, (axes,) = new_figure([HEIGHT])
    for each in rows:
        scores, label = each.result.scores, name(each, several_runs)
        if not isinstance(scores, AnswerScores):
            continue
        span = scores.interval
        text = f"{label}: accuracy {percent(scores.accuracy)} %, {scores.tokens_per_sample:,.1f} tokens per answer"
        if span is not None:
            text += f"; 95 % interval {percent(span.low)} to {percent(span.high)} %"
        point, *_ = axes.errorbar(
            scores.tokens_per_sample,
            100 * scores.accuracy,
            yerr=None if span is None else [[100 * (scores.accuracy - span.low)], [100 * (span.high - scores.accuracy)]],
            fmt=MARKERS[each.run_number % len(MARKERS)],
            color=COLOURS[colour(each.result.variant)],
            markersize=15 if below(each) else 10,
            zorder=2 if below(each) else 3,
            label=printable(label),
        )
        note(point, text)
    axes.margins(x=0.2, y=0.08)
    low, high = axes.get_xlim()
    axes.set_xlim(max(0, low), high + (high - low < 1))
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, min(low, high - 2)), min(100, max(high, low + 2)))
    axes.set_title("accuracy, %")
    axes.set_xlabel("tokens per answer (mean)")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    add_legend(figure)
    caption = "Whiskers: 95 % interval over problems. The vertical axis need not start at 0."
    return Chart("Accuracy against tokens per answer", caption, figure)


@styled
def accuracy_within_budget(rows: Sequence[EvaluatedVariant], several_runs: bool) -> Chart:
    """One line a variant: the fraction of samples that are correct with at most that many tokens."""
    low, high = token_range([record.tokens for each in rows for record in each.samples])
    figure, (axes,) = new_figure([HEIGHT])
    for each in rows:
        lengths = sorted(record.tokens for record in each.samples if record.correct)
        accuracy = [100 * done / len(each.samples) for done in range(len(lengths) + 1)]
        label = name(each, several_runs)
        text = f"{label}: {accuracy[-1]:.1f} % correct without a limit"
        if lengths:
            text += f"; half of the correct answers have at most {lengths[(len(lengths) - 1) // 2]:,} tokens"
        (line,) = axes.step(
            [low, *(max(length, low) for length in lengths), high],
            [*accuracy, accuracy[-1]],
            where="post",
            color=COLOURS[colour(each.result.variant)],
            linestyle=DASHES[each.run_number % len(DASHES)],
            linewidth=6 if below(each) else 2.4,
            alpha=0.5 if below(each) else 1,
            zorder=2 if below(each) else 3,
            label=printable(label),
        )
        note(line, text)
    draw_token_axis(axes, low, high, "tokens an answer may have (log scale)")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_title("accuracy, %")
    add_legend(figure)
    caption = "Fraction of samples that are correct within that many tokens: what a smaller max_new_tokens would have cost."
    return Chart("Accuracy within a budget of tokens", caption, figure)


def draw_token_axis(axes: Axes, low: float, high: float, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8) if high > 4 * low else MaxNLocator(5, integer=True))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axes.set_xlabel(label)


def token_range(tokens: Sequence[int]) -> tuple[float, float]:
    """Whole steps of the histograms' bins around all lengths, at least a doubling."""
    low = 2 ** (math.floor(BINS_PER_DOUBLING * math.log2(max(1, min(tokens)))) / BINS_PER_DOUBLING)
    high = 2 ** (math.floor(BINS_PER_DOUBLING * math.log2(max(1, max(tokens))) + 1) / BINS_PER_DOUBLING)
    while high < 2 * low:
        low, high = max(1.0, low * 2 ** (-1 / BINS_PER_DOUBLING)), high * 2 ** (1 / BINS_PER_DOUBLING)
    return low, high


def outcome(record: SampleRecord) -> str:
    if record.finish_reason == "length":
        return "truncated"
    return "correct" if record.correct else "incorrect"


@styled
def trace_lengths(rows: Sequence[EvaluatedVariant], several_runs: bool) -> list[Chart]:
    """A histogram for each variant, all with the same axes: samples by length, outcomes stacked."""
    low, high = token_range([record.tokens for each in rows for record in each.samples])
    bins = round(BINS_PER_DOUBLING * math.log2(high / low))
    edges = [low * (high / low) ** (number / bins) for number in range(bins + 1)]
    charts = []
    for each in rows:
        title, samples = name(each, several_runs), each.samples
        counts = {kind: sum(outcome(record) == kind for record in samples) for kind in OUTCOMES}
        median = sorted(record.tokens for record in samples)[(len(samples) - 1) // 2]
        listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count or kind != "truncated")
        figure, (axes,) = new_figure([150.0], width=340, left=44)
        draw_histogram(axes, samples, edges)
        draw_token_axis(axes, low, high, "tokens of an answer (log scale)")
        axes.set_title("samples")
        add_legend(figure, [Patch(color=COLOURS[colour_name], label=kind) for kind, colour_name in OUTCOMES.items()], columns=3)
        charts.append(Chart(title, f"{listed}; median {median:,} tokens", figure))
    highest = max(chart.figure.axes[0].get_ylim()[1] for chart in charts)
    for chart in charts:
        chart.figure.axes[0].set_ylim(0, highest)
        chart.figure.axes[0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return charts


def draw_histogram(axes: Axes, samples: Sequence[SampleRecord], edges: Sequence[float]) -> None:
    starts = [math.ceil(edge * (1 - 1e-9)) for edge in edges]
    stacked = np.zeros(len(edges) - 1)
    for kind, colour_name in OUTCOMES.items():
        counts, _ = np.histogram([record.tokens for record in samples if outcome(record) == kind], starts)
        widths = [0.94 * (right - left) for left, right in itertools.pairwise(edges)]
        bars = axes.bar(edges[:-1], counts, widths, stacked, align="edge", color=COLOURS[colour_name])
        for bar, count, (start, end) in zip(bars, counts, itertools.pairwise(starts), strict=True):
            note(
                bar,
                f"{count:,} {kind}, {f'{start:,} to ' if start < end - 1 else ''}{end - 1:,} tokens",
            )
            if not count:
                bar.remove()
        stacked += counts
