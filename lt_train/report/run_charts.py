"""The charts of one run: KV cache against length, scores of layers, losses, probes."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from lt_train.evaluation.statistics import wilson
from lt_train.report.charts import Chart, LegendEntry, swatch
from lt_train.report.contents import Run
from lt_train.report.figures import percent
from lt_train.report.results import KV_TOKENS, kv_bytes
from lt_train.report.svg import (
    DASHES,
    Plot,
    Scale,
    decimal_ticks,
    element,
    labelled,
    linear_ticks,
    marker,
    padded,
    path,
    plot,
    tooltip,
)
from lt_train.runtime.units import format_bytes, format_tokens
from lt_train.selection.profile import LayerProfile
from lt_train.training.probes.results import ProbeScore

MEANINGS = {
    "reach": ("rise of the loss on long-reach tokens when this layer alone streams", "nats per token"),
    "nll": ("rise of the loss on all answer tokens when this layer alone streams", "nats per token"),
    "lazy_ratio": ("attention of the last queries on sink and recent tokens; the more, the lazier", "share of attention"),
}
KV_STEPS = 64
PROBES_APART = 8.0
"""Pixels between probes of one checkpoint."""
PROBE_COLOURS = 4
"""That the style sheet has."""


def kv_growth(run: Run) -> Chart:
    """KV cache of one sequence as it grows, of the base and of every hybrid with another number of streaming layers."""
    total = len(run.config["layer_types"])
    longest = max(KV_TOKENS, min(131_072, run.config.get("max_position_embeddings") or 0))
    lazy = {0: ("base", "v-base")}
    for variant, layers in run.layers.items():
        lazy.setdefault(
            len(layers), (f"{len(layers)} of {total} layers stream", "v-trained" if variant == "converted" else "v-other")
        )
    unit, one = next((unit, one) for unit, one in UNITS if kv_bytes(run.config, 0, longest) >= one)
    y_ticks = linear_ticks(0, kv_bytes(run.config, 0, longest) / one)
    x_ticks = [longest * quarter / 4 for quarter in range(5)]
    axes = plot((0, longest), (0, y_ticks[-1]))
    lines = []
    for count, (label, css) in lazy.items():
        window = run.config["w_sink"] + run.config["sliding_window"]
        lengths = sorted({*(longest * step // KV_STEPS for step in range(KV_STEPS + 1)), min(window, longest)})
        points = [(axes.x(length), axes.y(kv_bytes(run.config, count, length) / one)) for length in lengths]
        held = kv_bytes(run.config, count, KV_TOKENS)
        note = f"{label}: {format_bytes(held)} at {format_tokens(KV_TOKENS)} tokens"
        if count:
            note += f", {held / kv_bytes(run.config, 0, KV_TOKENS):.3g} of the base's"
        line = element("path", tooltip(note), class_="line", d=path(points))
        dot = marker(0, axes.x(KV_TOKENS), axes.y(held / one), note)
        lines.append(element("g", line, dot, class_=css))
    drawn = axes.axes(
        labelled(x_ticks, format_tokens),
        labelled(y_ticks, lambda value: f"{value:.4g}"),
        "tokens of the sequence",
        f"KV cache, {unit}",
    )
    return Chart(
        "KV cache against length",
        f"One sequence, in the dtype of the base's weights. A streaming layer keeps {run.config['w_sink']} sink and "
        f"{run.config['sliding_window']:,} recent tokens. Points: {format_tokens(KV_TOKENS)} tokens.",
        axes.document("KV cache against length", drawn, *lines),
        tuple(LegendEntry(label, css, swatch(0, line=True)) for label, css in lazy.values()),
    )


UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def layer_scores(run: Run, profile: LayerProfile) -> list[Chart]:
    """A chart for each strategy that has scores: their mean and middle half over samples, for each layer."""
    return [draw_layers(run, profile, strategy) for strategy in profile.strategies]


def draw_layers(run: Run, profile: LayerProfile, strategy: str) -> Chart:
    chosen = run.layers["converted"]
    by_this = profile.choose(strategy, len(chosen))
    spread = [summary(score_S) for score_S in zip(*profile.scores[strategy], strict=True)]
    meaning, unit = MEANINGS[strategy]
    rises = strategy != "lazy_ratio"
    drawn = [value for each in spread for value in each] + ([0.0] if rises else [])  # a rise has a zero worth measuring from
    y_ticks = linear_ticks(*padded(min(drawn), max(drawn), least=1e-6, share=0.0))
    axes = layer_axes(profile.num_layers, y_ticks)
    parts = [axes.axes(layer_ticks(profile.num_layers), labelled(y_ticks, lambda value: f"{value:.4g}"), "layer", unit)]
    if y_ticks[0] < 0:
        parts.append(element("line", class_="axis", x1=axes.x.start, x2=axes.x.end, y1=axes.y(0), y2=axes.y(0)))
    half = (axes.x(1) - axes.x(0)) / 2 if profile.num_layers > 1 else 20.0
    for layer, (lower, mean, upper) in enumerate(spread):
        streams, x = layer in chosen, axes.x(layer)
        note = (
            f"layer {layer}: {mean:.4g} (middle half of {len(profile.samples)} samples {lower:.4g} to {upper:.4g}); "
            f"{'streams' if streams else 'keeps full attention'} in this run"
        )
        inside = [
            tooltip(note),
            element("rect", class_="hit", x=x - half, y=axes.y.end, width=2 * half, height=axes.y.start - axes.y.end),
        ]
        if layer in by_this:
            inside.append(
                element("rect", class_="tint", x=x - half, y=axes.y.end, width=2 * half, height=axes.y.start - axes.y.end)
            )
        inside.append(element("rect", class_="chosen", x=x - half * 0.86, y=axes.y.end - 14, width=half * 1.72, height=8.0))
        if rises:
            inside.append(element("line", class_="stem", x1=x, x2=x, y1=axes.y(0), y2=axes.y(mean)))
        inside.append(element("line", class_="spread", x1=x, x2=x, y1=axes.y(lower), y2=axes.y(upper)))
        inside.append(marker(0, x, axes.y(mean), radius=4.5))
        parts.append(element("g", *inside, class_="layer " + ("v-trained" if streams else "v-base")))
    caption = f"{meaning[0].upper()}{meaning[1:]}. Points: mean over {len(profile.samples)} samples; bars: their middle half."
    if rises:
        every = fmean(sample.all_streaming[strategy] for sample in profile.samples)
        caption += f" When every layer streams: {every:+.3g}."
    return Chart(
        f"Layer profile by {strategy}",
        caption,
        axes.document(f"Layer profile by {strategy}", *parts),
        layer_legend(strategy),
        wide=is_wide(profile.num_layers),
    )


def layer_axes(num_layers: int, y_ticks: Sequence[float]) -> Plot:
    width = 80 + 26.0 * num_layers if is_wide(num_layers) else 460.0
    return Plot(width, 290, Scale(-0.6, num_layers - 0.4, 58, width - 14), Scale(y_ticks[0], y_ticks[-1], 246, 46), headroom=24)


def is_wide(num_layers: int) -> bool:
    """Whether so many layers need more than a chart's usual width."""
    return num_layers > 20


def layer_ticks(num_layers: int) -> list[tuple[float, str]]:
    every = 1 if num_layers <= 12 or is_wide(num_layers) else 2
    return [(layer, str(layer)) for layer in range(0, num_layers, every)]


def layer_legend(strategy: str) -> tuple[LegendEntry, ...]:
    tint = element("rect", class_="tint", x=4, y=0, width=18, height=14)
    icon = element("svg", tint, class_="swatch", viewBox="0 0 26 14", aria_hidden="true")
    return (
        LegendEntry("streams in this run", "v-trained", swatch(0, line=False)),
        LegendEntry("keeps full attention", "v-base", swatch(0, line=False)),
        LegendEntry(f"{strategy} would let it stream", "v-trained", icon),
    )


def summary(score_S: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, mean, upper quartile (numpy's default, linear, so as in profile.png)."""
    ordered = sorted(score_S)
    return quantile(ordered, 0.25), fmean(ordered), quantile(ordered, 0.75)


def quantile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def loss_curve(run: Run) -> Chart | None:
    """Training loss at every logged step and held-out loss; None where nothing finite was logged.

    Of a distilled training it is the cross-entropy alone: the whole loss has another unit, and is nothing to hold held-out loss
    against.
    """
    distilled = any("sft_loss" in row for row in run.log)
    key = "sft_loss" if distilled else "loss"
    training, heldout = losses(run.log, key), losses(run.log, "eval_loss")
    both = [*training, *heldout]
    if not both:
        return None
    y_ticks = linear_ticks(*padded(min(loss for _, loss in both), max(loss for _, loss in both), least=1e-3, share=0.02))
    if y_ticks[0] < 0:
        y_ticks = [value for value in y_ticks if value >= 0]
    last = last_step(both)
    axes = plot((0, last), (y_ticks[0], y_ticks[-1]))
    parts = [draw_axes_over_steps(axes, last, labelled(y_ticks, lambda value: f"{value:.4g}"), "loss, nats per token")]
    entries = []
    if training:
        parts.append(element("g", draw_training(axes, training, "training loss"), class_="v-base"))
        entries.append(LegendEntry("training", "v-base", swatch(0, line=True)))
    if heldout:
        parts.append(element("g", *draw_heldout(axes, heldout), class_="v-trained"))
        entries.append(LegendEntry("held out", "v-trained", swatch(0, line=False)))
    lost = sum(key in row or "eval_loss" in row for row in run.log) - len(both)
    caption = f"{lost:,} logged losses are not finite and not drawn." if lost else "Mean over answer tokens."
    if distilled:
        caption += " Cross-entropy with the data; what the teacher adds to the loss has a chart of its own."
    svg = axes.document("Losses of the training", Markup("").join(parts))
    return Chart("Losses of the training", caption, svg, tuple(entries))


def divergence_curve(run: Run) -> Chart | None:
    """How far a distilled training's batches are from its teacher, at every logged step; None where nothing was distilled."""
    found = losses(run.log, "kl")
    drawn = [(step, kl) for step, kl in found if kl > 0]
    if not drawn:
        return None
    y_ticks = decimal_ticks(min(kl for _, kl in drawn), max(kl for _, kl in drawn))
    last = last_step(drawn)
    axes = plot((0, last), (y_ticks[0], y_ticks[-1]), log_y=True)
    parts = [draw_axes_over_steps(axes, last, labelled(y_ticks, lambda value: f"{value:g}"), "KL, nats per token (log scale)")]
    parts.append(element("g", draw_training(axes, drawn, "KL(teacher || model)"), class_="v-trained"))
    lost = sum("kl" in row for row in run.log) - len(drawn)
    temperature = run.settings["train"]["distill"]["temperature"]
    caption = (
        f"KL(teacher || model) of the next token at temperature {temperature:g}, mean over answer tokens. "
        "The teacher is the model before it was converted."
    )
    if lost:
        caption += f" {lost:,} logged values are not above 0, or not finite, and not drawn."
    return Chart("Divergence from the teacher", caption, axes.document("Divergence from the teacher", *parts))


def probe_curves(run: Run) -> Chart | None:
    """What each probe found at each probed step, with its interval; None without probes.

    Probes lie a little beside each other, for small ones often agree.
    """
    if not run.probes:
        return None
    last = max(result.step for result in run.probes)
    names = list(dict.fromkeys(score.probe for result in run.probes for score in result.scores))
    axes = plot((0, last), (0, 1))
    y_labels = labelled([0.0, 0.25, 0.5, 0.75, 1.0], lambda value: f"{100 * value:.4g}")
    parts, entries = [draw_axes_over_steps(axes, last, y_labels, "right, %")], []
    for number, name in enumerate(names):
        found = [(result.step, score) for result in run.probes for score in result.scores if score.probe == name]
        aside = PROBES_APART * (number - (len(names) - 1) / 2)
        parts.append(element("g", *draw_probe(axes, number, found, aside), class_=probe_colour(number)))
        entries.append(LegendEntry(f"{name}: {asked_by(found)}", probe_colour(number), swatch(number, line=False)))
    return Chart(
        "Probes of the checkpoints",
        "Share of answers that were right, by checkpoint. Bars: 95 % interval over problems (Wilson's).",
        axes.document("Probes of the checkpoints", *parts),
        tuple(entries),
    )


def last_step(rows: Sequence[tuple[int, float]]) -> int:
    return max(1, *(step for step, _ in rows))


def draw_axes_over_steps(axes: Plot, last: int, y_ticks: Sequence[tuple[float, str]], y_label: str) -> Markup:
    steps = [step for step in linear_ticks(0, last) if axes.x.holds(step) and step == int(step)]
    return axes.axes(labelled(steps, lambda step: f"{step:,.0f}"), y_ticks, "optimizer step", y_label)


def probe_colour(number: int) -> str:
    return f"p-{number % PROBE_COLOURS}"


def asked_by(found: Sequence[tuple[int, ProbeScore]]) -> str:
    counts = sorted({score.problems for _, score in found})
    return " or ".join(f"{count:,}" for count in counts) + f" problem{'s' * (counts != [1])}"


def draw_probe(axes: Plot, number: int, found: Sequence[tuple[int, ProbeScore]], aside: float) -> list[Markup]:
    """`aside`: pixels by which it is moved."""
    points = [(axes.x(step) + aside, axes.y(score.accuracy)) for step, score in found]
    drawn = [element("path", class_="line thin", d=path(points), stroke_dasharray=DASHES[number % len(DASHES)])]
    for (x, y), (step, score) in zip(points, found, strict=True):
        span = wilson(score.accuracy, score.problems)
        drawn.append(element("line", class_="whisker", x1=x, x2=x, y1=axes.y(span.low), y2=axes.y(span.high)))
        note = f"{score.probe}: {percent(score.accuracy)} % of {score.problems:,} problems at step {step:,}"
        note += f"; 95 % interval {percent(span.low)} to {percent(span.high)} %"
        if score.truncated:
            note += f"; {percent(score.truncated)} % of the answers were cut off"
        drawn.append(marker(number, x, y, note))
    return drawn


def losses(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(row["step"], row[key]) for row in log if isinstance(row.get(key), int | float)]
    return [(step, loss) for step, loss in found if math.isfinite(loss)]


def draw_training(axes: Plot, rows: Sequence[tuple[int, float]], what: str) -> Markup:
    points = [(axes.x(step), axes.y(loss)) for step, loss in rows]
    note = f"{what}: {rows[0][1]:.4g} at step {rows[0][0]:,}, {rows[-1][1]:.4g} at step {rows[-1][0]:,}"
    if len(points) == 1:
        return marker(0, *points[0], note)
    return element("path", tooltip(note), class_="line thin", d=path(points))


def draw_heldout(axes: Plot, rows: Sequence[tuple[int, float]]) -> list[Markup]:
    points = [(axes.x(step), axes.y(loss)) for step, loss in rows]
    line = element("path", class_="line", d=path(points))
    dots = [
        marker(0, x, y, f"held-out loss {loss:.4g} at step {step:,}") for (x, y), (step, loss) in zip(points, rows, strict=True)
    ]
    return [line, *dots]
