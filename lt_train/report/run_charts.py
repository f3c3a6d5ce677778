"""The charts of one run: layer profile, KV cache against length, training, probes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from lt_train.evaluation.statistics import wilson
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import CONVERTED
from lt_train.report.charts import DASHES, HEIGHT, MARKERS, Chart
from lt_train.report.contents import Run
from lt_train.report.formatting import percent
from lt_train.report.results import cache_bytes
from lt_train.runtime.drawing import COLOURS, add_legend, new_figure, note, styled
from lt_train.runtime.units import byte_unit, format_bytes, format_tokens
from lt_train.selection.chosen import describe_streaming
from lt_train.selection.curve import curve_figure
from lt_train.selection.picture import profile_figure
from lt_train.selection.profile import LayerProfile
from lt_train.training.probes.results import ProbeScore

KV_STEPS = 64
PROBES_APART = 8.0
"""Pixels between probes of one checkpoint."""
PROBE_COLOURS = ("trained", "incorrect", "converted", "lazy_ratio")
WIDE = 20
"""Positive values that differ by more than this factor are drawn on a log scale: on another the small ones show nothing."""


def layer_profile(run: Run, profile: LayerProfile) -> Chart:
    """The picture of selection/, which the run folder has as profile/profile.png."""
    chosen = _chosen(run)
    caption = f"Scores by layer, mean and interquartile range over {len(profile.samples)} samples."
    if chosen.split_layers:
        stability = profile.stability_of_heads(chosen.number_of_streaming_heads(run.kv_heads))
        caption += "" if stability is None else f" By gates, {stability.overlap}."
    for strategy in () if chosen.split_layers else profile.strategies:
        stability = profile.stability(strategy, len(chosen.lazy_layers))
        caption += "" if stability is None else f" By {strategy}, {stability.overlap}."
    return Chart("Layer profile", caption, profile_figure(profile, chosen))


def _chosen(run: Run) -> HybridSpec:
    """The streaming layers of the run's hybrid; none where each prompt chooses."""
    spec = run.spec(CONVERTED)
    return spec if run.chosen[CONVERTED] else spec.all_full


def predicted_rise(run: Run, profile: LayerProfile) -> Chart | None:
    """The picture of selection/, which the run folder has as profile/curve.png; None without scores by gates."""
    if "gates" not in profile.strategies:
        return None
    caption = (
        f"What gates predicts, untrained, from {len(profile.samples)} samples: the shares of what streams, added up. "
        "The further down and to the left, the better."
    )
    return Chart("Predicted rise against KV cache", caption, curve_figure(profile, _chosen(run)))


@styled
def kv_growth(run: Run) -> Chart:
    """KV cache of one sequence as it grows, of the base and of every hybrid with another number of streaming KV heads."""
    full = run.spec(CONVERTED).all_full
    longest = max(KV_TOKENS, min(131_072, context_length({"max_position_embeddings": 0, **run.config})))
    unit, size = byte_unit(cache_bytes(run.config, full, longest))
    drawn = {0: (full, "base", "base")}
    for variant in run.chosen:
        spec, colour = run.spec(variant), "trained" if variant == CONVERTED else "lazy_ratio"
        count = spec.number_of_streaming_heads(run.kv_heads)
        drawn.setdefault(count, (spec, describe_streaming(spec, run.kv_heads), colour))
    figure, (axes,) = new_figure([HEIGHT])
    window = full.window
    lengths = sorted({*(longest * step // KV_STEPS for step in range(KV_STEPS + 1)), min(window, longest)})
    for spec, label, colour in drawn.values():
        at_32k = cache_bytes(run.config, spec, KV_TOKENS)
        text = f"{label}: {format_bytes(at_32k)} at {format_tokens(KV_TOKENS)} tokens"
        if spec.streams:
            text += f", {at_32k / cache_bytes(run.config, full, KV_TOKENS):.3g} of the base's"
        cache = [cache_bytes(run.config, spec, length) / size for length in lengths]
        (line,) = axes.plot(lengths, cache, color=COLOURS[colour], linewidth=2.4, label=label)
        (point,) = axes.plot(KV_TOKENS, at_32k / size, "o", color=COLOURS[colour])
        note(line, text)
        note(point, text)
    axes.set_xlim(0, longest)
    axes.set_ylim(bottom=0)
    axes.set_xticks([longest * quarter / 4 for quarter in range(5)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axes.set_xlabel("tokens of the sequence")
    axes.set_title(f"KV cache, {unit}")
    add_legend(figure)
    caption = (
        f"One sequence, in the dtype of the base's weights. What streams keeps {run.config['w_sink']} sink and "
        f"{full.w_recent:,} recent tokens. Points: {format_tokens(KV_TOKENS)} tokens."
    )
    return Chart("KV cache against length", caption, figure)


@styled
def training_curves(run: Run) -> Chart | None:
    """Loss, gradient norm and learning rate at every logged step; None where no loss is finite.

    Of a distilled training the loss is the cross-entropy alone: the total loss has another unit, and is nothing to compare with
    held-out loss.
    """
    distilled = any("sft_loss" in row for row in run.log)
    key = "sft_loss" if distilled else "loss"
    training, heldout = finite(run.log, key), finite(run.log, "eval_loss")
    if not training and not heldout:
        return None
    beside = {name: found for name in ("grad_norm", "learning_rate") if (found := finite(run.log, name))}
    figure, (axes, *others) = new_figure([130.0, *[60.0] * len(beside)])
    draw_curve(axes, training, "training loss", "base", label="training")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color=COLOURS["trained"], linewidth=2.4)
        for step, loss in heldout:
            (point,) = axes.plot(step, loss, "o", color=COLOURS["trained"], label="held out" if step == heldout[0][0] else None)
            note(point, f"held-out loss {loss:.4g} at step {step:,}")
    set_scale(axes, "loss, nats per token", training + heldout)
    for panel, (name, found) in zip(others, beside.items(), strict=True):
        draw_curve(panel, found, name.replace("grad_norm", "gradient norm").replace("_", " "), "converted")
        if name == "learning_rate":
            panel.set_ylim(bottom=0)
            panel.set_title("learning rate")
        else:
            set_scale(panel, "gradient norm", found)
        panel.yaxis.set_major_formatter("{x:g}")
    draw_steps(figure.axes[-1], training + heldout)
    add_legend(figure, columns=2)
    logged = sum(name in row for row in run.log for name in (key, "eval_loss", "grad_norm", "learning_rate"))
    lost = logged - len(training) - len(heldout) - sum(map(len, beside.values()))
    caption = f"{lost:,} logged values are not finite and not drawn." if lost else "Loss: mean over answer tokens."
    if distilled:
        caption += " Cross-entropy with the data; what the teacher adds to the loss has a chart of its own."
    return Chart("Training", caption, figure)


@styled
def divergence_curve(run: Run) -> Chart | None:
    """How far a distilled training's batches are from its teacher, at every logged step; None where nothing was distilled."""
    drawn = [(step, kl) for step, kl in finite(run.log, "kl") if kl > 0]
    if not drawn:
        return None
    figure, (axes,) = new_figure([HEIGHT])
    draw_curve(axes, drawn, "KL(teacher || model)", "trained")
    set_log(axes, "KL, nats per token (log scale)", [kl for _, kl in drawn])
    draw_steps(axes, drawn)
    lost = sum("kl" in row for row in run.log) - len(drawn)
    temperature = run.settings["train"]["distill"]["temperature"]
    caption = (
        f"KL(teacher || model) of the next token at temperature {temperature:g}, mean over answer tokens. "
        "The teacher is the model before it was converted."
    )
    if lost:
        caption += f" {lost:,} logged values are not above 0, or not finite, and not drawn."
    return Chart("Divergence from the teacher", caption, figure)


@styled
def probe_curves(run: Run) -> Chart | None:
    """The result of each probe at each probed step, with its interval; None without probes.

    Probes are drawn a little beside each other, because small ones often agree.
    """
    if not run.probes:
        return None
    names = list(dict.fromkeys(score.probe for result in run.probes for score in result.scores))
    figure, (axes,) = new_figure([HEIGHT])
    for number, name in enumerate(names):
        found = [(result.step, score) for result in run.probes for score in result.scores if score.probe == name]
        aside = PROBES_APART * (number - (len(names) - 1) / 2)
        draw_probe(axes, number, found, ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans))
    axes.set_ylim(-2, 102)
    axes.set_title("accuracy, %")
    draw_steps(axes, [(result.step, 0.0) for result in run.probes])
    add_legend(figure)
    caption = "Accuracy by checkpoint. Bars: 95 % interval over problems (Wilson's)."
    return Chart("Probes of the checkpoints", caption, figure)


def draw_probe(axes: Axes, number: int, found: Sequence[tuple[int, ProbeScore]], offset: Transform) -> None:
    counts = sorted({score.problems for _, score in found})
    problems = " or ".join(f"{count:,}" for count in counts) + f" problem{'s' * (counts != [1])}"
    moved = axes.transData + offset
    colour = COLOURS[PROBE_COLOURS[number % len(PROBE_COLOURS)]]
    dash = DASHES[number % len(DASHES)]
    axes.plot([step for step, _ in found], [100 * score.accuracy for _, score in found], dash, color=colour, transform=moved)
    for step, score in found:
        span = wilson(score.accuracy, score.problems)
        point, *_ = axes.errorbar(
            step,
            100 * score.accuracy,
            yerr=[[100 * (score.accuracy - span.low)], [100 * (span.high - score.accuracy)]],
            fmt=MARKERS[number % len(MARKERS)],
            color=colour,
            transform=moved,
            label=f"{score.probe}: {problems}" if step == found[0][0] else None,
        )
        text = f"{score.probe}: {percent(score.accuracy)} % of {score.problems:,} problems at step {step:,}"
        text += f"; 95 % interval {percent(span.low)} to {percent(span.high)} %"
        if score.truncated:
            text += f"; {percent(score.truncated)} % of the answers were truncated"
        note(point, text)


def finite(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(row["step"], row[key]) for row in log if isinstance(row.get(key), int | float)]
    return [(step, value) for step, value in found if math.isfinite(value)]


def draw_curve(axes: Axes, rows: Sequence[tuple[int, float]], what: str, colour: str, label: str | None = None) -> None:
    if not rows:
        return
    steps, values = zip(*rows, strict=True)
    (line,) = axes.plot(steps, values, "o" if len(rows) == 1 else "-", color=COLOURS[colour], label=label)
    note(line, f"{what}: {values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step {steps[-1]:,}")


def set_scale(axes: Axes, title: str, rows: Sequence[tuple[int, float]]) -> None:
    """Name the vertical axis, and make it logarithmic where a linear one would show the largest values alone."""
    values = [value for _, value in rows]
    if min(values) > 0 and max(values) > WIDE * min(values):
        set_log(axes, f"{title} (log scale)", values)
    else:
        axes.set_title(title)


def set_log(axes: Axes, title: str, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    decades = [10.0**exponent for exponent in range(lowest, highest + 1)]
    most = max(2, int(axes.bbox.height / 25))
    axes.yaxis.set_major_locator(FixedLocator(decades[:: math.ceil(len(decades) / most)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(decades[0], decades[-1])
    axes.set_title(title)


def draw_steps(axes: Axes, rows: Sequence[tuple[int, float]]) -> None:
    last = max(1, *(step for step, _ in rows))
    axes.set_xlim(0, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step")
