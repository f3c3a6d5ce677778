"""The charts that compare variants: accuracy against tokens, and how long right, wrong and cut answers are."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lt_train.evaluation.records import SampleRecord
from lt_train.evaluation.scores import AnswerScores
from lt_train.report.contents import Measured
from lt_train.report.figures import ends, percent
from lt_train.report.svg import (
    DASHES,
    Plot,
    binary_ticks,
    element,
    labelled,
    linear_ticks,
    marker,
    padded,
    plot,
    steps,
    tooltip,
)
from lt_train.runtime.units import format_tokens

BINS_PER_DOUBLING = 4
OUTCOMES = ("right", "wrong", "cut off")
COLOURED = ("base", "converted", "trained", *(f"converted-by-{name}" for name in ("reach", "nll", "lazy_ratio", "periodic")))
"""Variants that the style sheet has a colour for."""


@dataclass(frozen=True)
class LegendEntry:
    label: str
    colour: str
    """A class of the style sheet."""
    swatch: Markup


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    svg: Markup
    legend: tuple[LegendEntry, ...] = ()
    wide: bool = False
    """Keeps its size on a narrow screen and is scrolled there."""


def colour(variant: str) -> str:
    return f"v-{variant}" if variant in COLOURED else "v-other"


def name(each: Measured, several_runs: bool) -> str:
    return f"{each.run}: {each.result.label}" if several_runs else each.result.label


def bases_first(rows: Sequence[Measured]) -> list[Measured]:
    """In the order in which to draw: what comes later lies on top."""
    return sorted(rows, key=lambda each: each.result.variant != "base")


def radius_of(each: Measured) -> float:
    """The base's point is larger and its line broader: both lie below the others and stay visible where a hybrid is as good."""
    return 7.5 if each.result.variant == "base" else 5.0


def line_of(each: Measured) -> str:
    return "line under" if each.result.variant == "base" else "line"


def legend(rows: Sequence[Measured], several_runs: bool, lines: bool = False) -> tuple[LegendEntry, ...]:
    return tuple(
        LegendEntry(name(each, several_runs), colour(each.result.variant), swatch(each.run_number, lines)) for each in rows
    )


def swatch(run_number: int, line: bool) -> Markup:
    stroke = element("line", class_="line", x1=0, x2=26, y1=7, y2=7, stroke_dasharray=DASHES[run_number % len(DASHES)])
    return element(
        "svg", stroke if line else marker(run_number, 13.0, 7.0), class_="swatch", viewBox="0 0 26 14", aria_hidden="true"
    )


def accuracy_by_tokens(rows: Sequence[Measured], several_runs: bool) -> Chart:
    """One point a variant: accuracy with its 95 % interval over the mean number of tokens of an answer."""
    every = [each.result.scores for each in rows]
    bounds = [value for scores in every for value in (scores.accuracy, *ends(scores.interval))]
    tokens = [scores.tokens_per_sample for scores in every]
    low, high = padded(min(bounds), max(bounds), least=0.02)
    y_ticks = linear_ticks(max(0.0, low), min(1.0, high))
    x_ticks = linear_ticks(
        *(max(0.0, end) for end in padded(min(tokens), max(tokens), least=0.2 * max(1.0, max(tokens)), share=0.15))
    )
    axes = plot((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    points = []
    for each in bases_first(rows):
        scores, span = each.result.scores, each.result.scores.interval
        x, y = axes.x(scores.tokens_per_sample), axes.y(scores.accuracy)
        inside = []
        note = f"{name(each, several_runs)}: {percent(scores.accuracy)} % right, {scores.tokens_per_sample:,.1f} tokens per answer"
        if span is not None:
            note += f"; 95 % interval {percent(span.low)} to {percent(span.high)} %"
            low_y, high_y = axes.y(span.low), axes.y(span.high)
            inside = [
                element("line", class_="whisker", x1=x, x2=x, y1=low_y, y2=high_y),
                *(element("line", class_="whisker", x1=x - 5, x2=x + 5, y1=at, y2=at) for at in (low_y, high_y)),
            ]
        points.append(
            element("g", *inside, marker(each.run_number, x, y, note, radius_of(each)), class_=colour(each.result.variant))
        )
    drawn = axes.axes(
        labelled(x_ticks, lambda value: f"{value:,.6g}"),
        labelled(y_ticks, lambda value: f"{100 * value:.4g}"),
        "tokens per answer (mean)",
        "right, %",
    )
    return Chart(
        "Accuracy against tokens per answer",
        "Whiskers: 95 % interval over problems. The vertical axis need not start at 0.",
        axes.document("Accuracy against mean tokens per answer", drawn, *points),
        legend(rows, several_runs),
    )


def accuracy_within_budget(rows: Sequence[Measured], several_runs: bool) -> Chart:
    """One line a variant: the share of samples that were right with at most so many tokens."""
    tokens = [record.tokens for each in rows for record in each.samples]
    low, high = token_range(tokens)
    most = max(right_within(each.samples, high) for each in rows)
    y_ticks = linear_ticks(0.0, max(most, 0.01))
    axes = plot((low, high), (0.0, y_ticks[-1]), log_x=True)
    lines = []
    for each in bases_first(rows):
        lengths = sorted(record.tokens for record in each.samples if record.correct)
        shares = [(length, (done + 1) / len(each.samples)) for done, length in enumerate(lengths)]
        points = [(axes.x(low), axes.y(0)), *((axes.x(max(length, low)), axes.y(share)) for length, share in thinned(shares))]
        points.append((axes.x(high), axes.y(len(lengths) / len(each.samples))))
        note = f"{name(each, several_runs)}: {percent(len(lengths) / len(each.samples))} % right in the end"
        if lengths:
            note += f"; half of the right answers have at most {lengths[(len(lengths) - 1) // 2]:,} tokens"
        dashes = DASHES[each.run_number % len(DASHES)]
        line = element("path", tooltip(note), class_=line_of(each), d=steps(points), stroke_dasharray=dashes)
        lines.append(element("g", line, class_=colour(each.result.variant)))
    drawn = axes.axes(
        labelled(binary_ticks(low, high), format_tokens),
        labelled(y_ticks, lambda value: f"{100 * value:.4g}"),
        "tokens an answer may have (log scale)",
        "right, %",
    )
    return Chart(
        "Accuracy within a budget of tokens",
        "Share of samples that are right and have no more than so many tokens: what a smaller max_new_tokens would have cost.",
        axes.document("Accuracy within a budget of tokens", drawn, *lines),
        legend(rows, several_runs, lines=True),
    )


def right_within(samples: Sequence[SampleRecord], tokens: float) -> float:
    return sum(record.correct and record.tokens <= tokens for record in samples) / len(samples)


def thinned(shares: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """One point for each length, the last: several samples of one length make one step."""
    return list(dict(shares).items())


def token_range(tokens: Sequence[int]) -> tuple[float, float]:
    """Whole steps of the histograms' bins around all lengths, at least a doubling."""
    low = 2 ** (math.floor(BINS_PER_DOUBLING * math.log2(max(1, min(tokens)))) / BINS_PER_DOUBLING)
    high = 2 ** (math.floor(BINS_PER_DOUBLING * math.log2(max(1, max(tokens))) + 1) / BINS_PER_DOUBLING)
    while high < 2 * low:
        low, high = max(1.0, low * 2 ** (-1 / BINS_PER_DOUBLING)), high * 2 ** (1 / BINS_PER_DOUBLING)
    return low, high


def outcome(record: SampleRecord) -> str:
    if record.finish_reason == "length":
        return "cut off"
    return "right" if record.correct else "wrong"


def trace_lengths(rows: Sequence[Measured], several_runs: bool) -> list[Chart]:
    """A histogram for each variant, all with the same axes: samples by length, right, wrong and cut off stacked."""
    low, high = token_range([record.tokens for each in rows for record in each.samples])
    edges = bin_edges(low, high)
    counts = [count_lengths(each.samples, edges) for each in rows]
    most = max(sum(each) for table in counts for each in zip(*table.values(), strict=True))
    y_ticks = [value for value in linear_ticks(0, most, 4) if value == int(value)]
    axes = plot((low, high), (0.0, max(y_ticks[-1], most)), log_x=True, width=340, height=230)
    drawn = axes.axes(
        labelled(binary_ticks(low, high, most=5), format_tokens),
        labelled(y_ticks, lambda value: f"{value:,.0f}"),
        "tokens of an answer (log scale)",
        "samples",
    )
    charts = []
    for each, table in zip(rows, counts, strict=True):
        title = name(each, several_runs)
        median = sorted(record.tokens for record in each.samples)[(len(each.samples) - 1) // 2]
        said = ", ".join(f"{sum(table[kind]):,} {kind}" for kind in OUTCOMES if sum(table[kind]) or kind != "cut off")
        svg = axes.document(f"Lengths of answers: {title}", drawn, *bars(axes, edges, table))
        charts.append(Chart(title, f"{said}; median {median:,} tokens", svg))
    return charts


def bin_edges(low: float, high: float) -> list[float]:
    bins = round(BINS_PER_DOUBLING * math.log2(high / low))
    return [low * (high / low) ** (number / bins) for number in range(bins + 1)]


def count_lengths(samples: Sequence[SampleRecord], edges: Sequence[float]) -> dict[str, list[int]]:
    """Samples by outcome and bin; a bin holds its lower edge, not its upper one."""
    table = {kind: [0] * (len(edges) - 1) for kind in OUTCOMES}
    for record in samples:
        number = bisect.bisect_right(edges, max(1, record.tokens) * (1 + 1e-9)) - 1
        table[outcome(record)][min(max(number, 0), len(edges) - 2)] += 1
    return table


def bars(axes: Plot, edges: Sequence[float], table: dict[str, list[int]]) -> list[Markup]:
    drawn = []
    for number, (left, right) in enumerate(itertools.pairwise(edges)):
        below = 0
        for kind in OUTCOMES:
            count = table[kind][number]
            if count:
                top, bottom = axes.y(below + count), axes.y(below)
                first, last = math.ceil(left * (1 - 1e-9)), math.ceil(right * (1 - 1e-9)) - 1
                span = f"{first:,} tokens" if first == last else f"{first:,} to {last:,} tokens"
                drawn.append(
                    element(
                        "rect",
                        tooltip(f"{count:,} {kind}, {span}"),
                        class_=f"bar o-{kind.replace(' ', '-')}",
                        x=axes.x(left) + 0.75,
                        y=top,
                        width=axes.x(right) - axes.x(left) - 1.5,
                        height=bottom - top,
                    )
                )
            below += count
    return drawn


def outcome_legend() -> tuple[LegendEntry, ...]:
    box = element("rect", class_="bar", x=6, y=1, width=12, height=12, rx=2)
    icon = element("svg", box, class_="swatch", viewBox="0 0 26 14", aria_hidden="true")
    labels = {"right": "right", "wrong": "wrong", "cut off": "cut off at max_new_tokens"}
    return tuple(LegendEntry(labels[kind], f"o-{kind.replace(' ', '-')}", icon) for kind in OUTCOMES)


def is_answers(each: Measured) -> bool:
    return isinstance(each.result.scores, AnswerScores)
