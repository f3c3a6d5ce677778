"""Each chart shows the numbers that it was given, where its axes say, and names them in its tooltips."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lt_train.evaluation.scores import AnswerScores, read_scores
from lt_train.report import charts, run_charts
from lt_train.report.charts import Chart
from lt_train.report.contents import EvaluatedVariant, Run, read_runs
from lt_train.report.page import run_part
from lt_train.report.results import cache_bytes
from lt_train.runtime.drawing import COLOURS, note_of
from lt_train.runtime.files import append_json_line
from lt_train.runtime.units import byte_unit
from lt_train.training.probes.results import ProbeResult, ProbeScore, write_result
from tests.support.made_runs import ANSWERS, made_run, record


@pytest.fixture
def contents(run: Path) -> Run:
    return read_runs([run])[0]


@pytest.fixture
def rows(contents: Run) -> list[EvaluatedVariant]:
    return [each for each in contents.measured if each.result.evaluation == "ledger"]


def artists(axes: Axes, colour: str, kind: type[Artist]) -> list:
    """Of one kind and one colour of the palette, in the order of drawing."""
    found = []
    for artist in axes.findobj(kind):
        own = artist.get_facecolor() if isinstance(artist, Rectangle) else artist.get_color()
        if artist.axes is axes and to_hex(own) == COLOURS[colour]:
            found.append(artist)
    return found


def lines(axes: Axes, colour: str) -> list[Line2D]:
    return [line for line in artists(axes, colour, Line2D) if line in axes.lines]


def tooltips(chart: Chart) -> list[str]:
    return [text for artist in chart.figure.findobj() if (text := note_of(artist)) is not None]


def points(line: Line2D) -> list[tuple[float, float]]:
    return list(zip(*map(list, line.get_data()), strict=True))


def flat(pairs: Sequence[tuple[float, float]]) -> list[float]:
    return [value for pair in pairs for value in pair]


def bars_of_error(axes: Axes) -> Iterator[tuple[Line2D, tuple[float, float]]]:
    """Each point with an interval, and the ends of that."""
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        point, _, (bars,) = container.lines
        (segment,) = bars.get_segments()
        yield point, (segment[0][1], segment[1][1])


def labels(chart: Chart) -> list[str]:
    return [text.get_text() for text in chart.figure.legends[0].get_texts()]


def test_accuracy_is_drawn_over_mean_tokens_with_its_interval(run, rows):
    chart = charts.accuracy_by_tokens(rows, several_runs=False)
    (axes,) = chart.figure.axes
    drawn = {to_hex(point.get_color()): (point, ends) for point, ends in bars_of_error(axes)}
    for variant in ("base", "converted", "trained"):
        scores = read_scores(run / "eval" / variant / "ledger/scores.json")
        assert isinstance(scores, AnswerScores) and scores.interval is not None
        point, ends = drawn[COLOURS[variant]]
        assert points(point) == [(scores.tokens_per_sample, pytest.approx(100 * scores.accuracy))]
        assert ends == pytest.approx((100 * scores.interval.low, 100 * scores.interval.high))
        assert f"accuracy {100 * scores.accuracy:.1f} %" in (note_of(point) or "")
    low, high = axes.get_ylim()
    assert 0 <= low < min(ends[0] for _, ends in drawn.values()) and high == 100


def test_a_budget_of_tokens_has_the_answers_that_are_correct_within_it(rows):
    (axes,) = charts.accuracy_within_budget(rows, several_runs=False).figure.axes
    for variant, records in ANSWERS.items():
        (line,) = lines(axes, variant)
        assert line.get_drawstyle() == "steps-post"
        for budget in (62, 68, 95, 105, 150, 205, 400, 520):
            shown = next((y for x, y in reversed(points(line)) if x <= budget), 0.0)
            assert shown == pytest.approx(100 * sum(r.correct and r.tokens <= budget for r in records) / len(records))
        assert points(line)[-1] == (axes.get_xlim()[1], pytest.approx(100 * sum(r.correct for r in records) / len(records)))


def test_histograms_count_every_sample_once_by_length_and_outcome(rows):
    found = charts.trace_lengths(rows, several_runs=False)
    for chart, (variant, records) in zip(found, ANSWERS.items(), strict=True):
        (axes,) = chart.figure.axes
        for outcome, colour in charts.OUTCOMES.items():
            bars = [bar for bar in artists(axes, colour, Rectangle) if bar in axes.patches]
            wanted = [r.tokens for r in records if charts.outcome(r) == outcome]
            assert sum(bar.get_height() for bar in bars) == len(wanted), (variant, outcome)
            spans = [(bar.get_x(), bar.get_x() + bar.get_width() / 0.94) for bar in bars]
            for tokens in wanted:
                assert any(left - 1e-6 <= tokens < right for left, right in spans)
    assert len({chart.figure.axes[0].get_ylim() for chart in found}) == len({c.figure.axes[0].get_xlim() for c in found}) == 1


def test_a_truncated_answer_is_neither_correct_nor_incorrect_in_a_histogram_and_is_named(rows):
    captions = [chart.caption for chart in charts.trace_lengths(rows, several_runs=False)]
    assert captions == [
        "3 correct, 1 incorrect; median 90 tokens",
        "1 correct, 2 incorrect, 1 truncated; median 80 tokens",
        "3 correct, 1 incorrect; median 95 tokens",
    ]


def test_histogram_bars_name_what_they_hold(rows):
    texts = [text for chart in charts.trace_lengths(rows, several_runs=False) for text in tooltips(chart)]
    assert "1 truncated, 512 to 608 tokens" in texts  # a quarter of a doubling from 512: up to 608.87


@pytest.mark.parametrize("tokens", [[1], [1, 1], [82, 82], [1, 131072], [7, 8]])
def test_any_lengths_have_a_histogram(rows, tokens):
    samples = tuple(record("p0", sample=number, tokens=count) for number, count in enumerate(tokens))
    (chart,) = charts.trace_lengths([replace(rows[0], samples=samples)], several_runs=False)
    assert sum(int(text.split()[0]) for text in tooltips(chart)) == len(tokens)
    assert chart.svg.startswith("<svg")


@pytest.mark.parametrize("tokens", [(82, 82), (82, 140), (64, 512), (1, 131072), (20_000, 32_768)])
def test_an_axis_of_tokens_has_a_few_labels_that_differ(rows, tokens):
    samples = tuple(record("p0", sample=number, tokens=count) for number, count in enumerate(tokens))
    (chart,) = charts.trace_lengths([replace(rows[0], samples=samples)], several_runs=False)
    axes = chart.figure.axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    written = [axes.xaxis.get_major_formatter()(tick) for tick in ticks]
    assert 2 <= len(set(written)) == len(written) <= 9


def test_kv_bytes_grow_as_the_cache_does(contents):
    chart = run_charts.kv_growth(contents)
    (axes,) = chart.figure.axes
    spec = contents.spec("converted")
    unit, size = byte_unit(cache_bytes(contents.config, spec.all_full, 32768))
    assert axes.get_title(loc="left") == f"KV cache, {unit}"
    for colour, each in (("base", spec.all_full), ("trained", spec)):
        line, point = lines(axes, colour)
        for tokens, cache in points(line):
            assert cache * size == pytest.approx(cache_bytes(contents.config, each, round(tokens)))
        assert points(point) == [(32768, pytest.approx(cache_bytes(contents.config, each, 32768) / size))]
    assert "2 of 4 layers stream: 16 MiB at 32K tokens, 0.5 of the base's" in tooltips(chart)


def test_the_layer_profile_of_the_page_is_the_picture_of_the_run_folder(contents):
    chart = run_charts.layer_profile(contents, contents.profile)
    strip, *panels = chart.figure.axes
    assert [panel.get_title(loc="left").partition(":")[0] for panel in panels] == ["reach", "lazy_ratio"]
    assert [to_hex(bar.get_facecolor()) for bar in strip.patches] == [COLOURS[name] for name in ("trained", "base") * 2]
    assert "layer 2: 0.1 (interquartile range over 2 samples 0.05 to 0.15); streams in this run" in tooltips(chart)
    same = contents.profile.stability("reach", 2).same
    assert f"By reach, the halves of the samples choose {same} of 2 layers alike (1.0 by chance)." in chart.caption


def test_losses_are_drawn_at_their_steps(contents):
    axes, *_ = run_charts.training_curves(contents).figure.axes
    (training,), (heldout, *dots) = lines(axes, "base"), lines(axes, "trained")
    assert points(training) == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert points(heldout) == [(2, 1.75)] and [points(dot) for dot in dots] == [[(2, 1.75)]]


def test_gradient_norm_and_learning_rate_are_drawn_below_the_loss_on_the_same_steps(contents):
    figure = run_charts.training_curves(contents).figure
    loss, norm, rate = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss, nats per token", "gradient norm", "learning rate"]
    (norms,), (rates,) = lines(norm, "converted"), lines(rate, "converted")
    assert points(norms) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert points(rates) == [(1, 1e-3), (2, 5e-4), (3, 0.0)]
    assert loss.get_xlim() == norm.get_xlim() == rate.get_xlim()


def test_every_axis_of_a_training_has_labels_that_differ_however_small_the_values(run):
    rows = [
        {"step": step, "loss": 0.3 * 0.8**step, "grad_norm": 1e-3 / step, "learning_rate": 1e-5 / step} for step in range(1, 31)
    ]
    (run / "train/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chart = run_charts.training_curves(read_runs([run])[0])
    loss, norm, rate = chart.figure.axes
    assert chart.svg  # lays the ticks
    assert [axes.get_yscale() for axes in (loss, norm, rate)] == ["log", "log", "linear"]  # a fall by 0.8^29 shows on a log scale
    for axes, values in ((loss, "loss"), (norm, "grad_norm"), (rate, "learning_rate")):
        low, high = axes.get_ylim()
        written = [
            label.get_text() for label, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low <= at <= high
        ]
        assert len(written) >= 2 and len(set(written)) == len(written)
        drawn = [row[values] for row in rows]
        assert low <= min(drawn) and max(drawn) <= high and (axes is rate or high / low < 100 * max(drawn) / min(drawn))


@pytest.fixture
def distilled(run):
    """A distilled training of three steps: its whole loss is far from its cross-entropy, and its divergence falls a hundredfold."""
    log = [
        {"step": step, "loss": 30.0 - step, "sft_loss": 1.0 / step, "kl": kl, "hidden_difference": 0.1}
        for step, kl in enumerate((0.5, 0.05, 0.005), start=1)
    ]
    (run / "train/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*log, {"step": 3, "eval_loss": 0.75})))
    return run


def test_the_divergence_of_a_distilled_training_is_drawn_on_a_log_scale(distilled):
    chart = run_charts.divergence_curve(read_runs([distilled])[0])
    (axes,) = chart.figure.axes
    (line,) = lines(axes, "trained")
    assert axes.get_yscale() == "log" and points(line) == [(1, 0.5), (2, 0.05), (3, 0.005)]
    assert "KL(teacher || model): 0.5 at step 1, 0.005 at step 3" in tooltips(chart)
    assert "temperature 1," in chart.caption


def test_of_a_distilled_training_the_cross_entropy_is_compared_with_the_held_out_loss(distilled):
    axes, *_ = run_charts.training_curves(read_runs([distilled])[0]).figure.axes
    (training,) = lines(axes, "base")
    assert flat(points(training)) == pytest.approx([1, 1, 2, 1 / 2, 3, 1 / 3])


def test_the_page_of_a_distilled_training_has_both_charts_and_another_has_none_of_divergence(distilled, tmp_path):
    titles = [chart.title for chart in run_part(read_runs([distilled])[0]).charts]
    assert titles == ["Layer profile", "Training", "KV cache against length", "Divergence from the teacher"]
    plain = read_runs([made_run(tmp_path / "others", "plain")])[0]
    assert run_charts.divergence_curve(plain) is None


def test_divergences_without_a_logarithm_are_left_out_and_counted(distilled):
    append_json_line(distilled / "train/log.jsonl", {"step": 4, "kl": 0.0})
    append_json_line(distilled / "train/log.jsonl", {"step": 5, "kl": math.nan})
    chart = run_charts.divergence_curve(read_runs([distilled])[0])
    assert chart.caption.endswith("2 logged values are not above 0, or not finite, and not drawn.")


def test_probes_are_drawn_at_their_steps_with_their_intervals(run):
    for step, needle, copying in ((2, 0.25, 1.0), (4, 0.5, 0.75)):
        scores = tuple(ProbeScore(name, correct, 0.125, 8, 0.25) for name, correct in (("needle", needle), ("copying", copying)))
        write_result(run / "train", ProbeResult(step, scores, ()))
    chart = run_charts.probe_curves(read_runs([run])[0])
    assert labels(chart) == ["needle: 8 problems", "copying: 8 problems"]
    (axes,) = chart.figure.axes
    assert points(lines(axes, "trained")[0]) == [(2, 25), (4, 50)]
    bars = [ends for point, ends in bars_of_error(axes) if to_hex(point.get_color()) == COLOURS["incorrect"]]
    assert flat(bars) == pytest.approx([67.6, 100, 40.9, 92.9], abs=0.05)  # Wilson's of 8 and 6 of 8
    assert "needle: 50.0 % of 8 problems at step 4; 95 % interval 21.5 to 78.5 %; 25.0 % of the answers were truncated" in tooltips(
        chart
    )


def test_probes_that_find_the_same_do_not_hide_each_other(run):
    scores = tuple(ProbeScore(name, 0.0, 0.0, 8, 0.0) for name in ("needle", "copying", "ledger"))
    write_result(run / "train", ProbeResult(2, scores, ()))
    chart = run_charts.probe_curves(read_runs([run])[0])
    (axes,) = chart.figure.axes
    drawn = list(bars_of_error(axes))
    places = [point.get_transform().transform(point.get_xydata())[0][0] for point, _ in drawn]
    assert places == sorted(set(places)) and min(b - a for a, b in itertools.pairwise(places)) >= 6
    assert all(high - low > 20 for _, (low, high) in drawn)  # none of 8 correct is no certainty


def test_a_run_without_probes_has_no_chart_of_them(contents):
    assert run_charts.probe_curves(contents) is None


def test_values_of_a_training_that_are_not_finite_are_left_out_and_counted(run):
    append_json_line(run / "train/log.jsonl", {"step": 4, "loss": math.nan, "grad_norm": math.inf})
    chart = run_charts.training_curves(read_runs([run])[0])
    assert chart.caption == "2 logged values are not finite and not drawn."
    assert "nan" not in chart.svg.lower() and "inf" not in chart.svg.lower()


def test_several_runs_are_distinguished_by_name_and_shape(tmp_path):
    runs = read_runs([made_run(tmp_path, "one"), made_run(tmp_path, "two")])
    rows = [each for run in runs for each in run.measured if each.result.evaluation == "ledger"]
    chart = charts.accuracy_by_tokens(rows, several_runs=True)
    assert labels(chart) == [
        f"{run}: {label}" for run in ("one", "two") for label in ("base", "reach, untrained", "reach, trained")
    ]
    shapes = [point.get_marker() for point, _ in bars_of_error(chart.figure.axes[0])]
    assert shapes == ["o"] * 3 + ["s"] * 3
    (axes,) = charts.accuracy_within_budget(rows, several_runs=True).figure.axes
    assert [line.get_linestyle() for line in lines(axes, "trained")] == ["-", "--"]


def test_the_base_lies_below_the_hybrids_and_is_larger(rows):
    (axes,) = charts.accuracy_by_tokens(rows, several_runs=False).figure.axes
    base, *others = [point for point, _ in bars_of_error(axes)]
    assert all(base.get_zorder() < other.get_zorder() and base.get_markersize() > other.get_markersize() for other in others)
