"""Each chart shows the numbers that it was given: positions are read back through the labels of its axes."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from lt_train.evaluation.scores import read_scores
from lt_train.report import charts, run_charts
from lt_train.report.contents import read_runs
from lt_train.report.page import run_part
from lt_train.report.results import kv_bytes
from lt_train.runtime.files import append_json_line
from lt_train.training.probes.results import ProbeResult, ProbeScore, write_result
from tests.support.made_runs import ANSWERS, LAZY_RATIO, REACH, made_run, record


@pytest.fixture
def contents(run):
    return read_runs([run])[0]


@pytest.fixture
def rows(contents):
    return [each for each in contents.measured if each.result.evaluation == "ledger"]


class Drawing:
    """A chart's SVG, whose pixels become values again by its tick labels."""

    def __init__(self, chart, *, log_x=False, log_y=False):
        self.root = ET.fromstring(str(chart.svg))
        self.log_x, self.log_y = log_x, log_y
        self._x, self._y = self._ticks("x"), self._ticks("y")

    def _ticks(self, axis):
        found = []
        for text in self.root.iter("text"):
            if text.get("class") == f"tick {axis}":
                at = float(text.get(axis)) - (4 if axis == "y" else 0)  # labels of y stand a little below their line
                found.append((at, number(text.text)))
        return found

    def x(self, pixel):
        return between(self._x[0], self._x[-1], pixel, self.log_x)

    def y(self, pixel):
        return between(self._y[0], self._y[-1], pixel, self.log_y)

    def groups(self, css):
        return [group for group in self.root.iter("g") if css in group.get("class", "").split()]

    def titles(self):
        return [title.text for title in self.root.iter("title")]


def between(first, last, pixel, log):
    (p0, v0), (p1, v1) = first, last
    if log:
        return math.exp(math.log(v0) + (pixel - p0) / (p1 - p0) * math.log(v1 / v0))
    return v0 + (pixel - p0) / (p1 - p0) * (v1 - v0)


def number(text):
    return float(text[:-1]) * 1024 if text.endswith("K") else float(text.replace(",", ""))


def points(path):
    """The corners of a path of M, L, H and V."""
    at, found = (0.0, 0.0), []
    for command, values in re.findall(r"([MLHV])([^MLHV]+)", path):
        numbers = [float(value) for value in values.split()]
        at = {"H": lambda n, a=at: (n[0], a[1]), "V": lambda n, a=at: (a[0], n[0])}.get(command, lambda n: (n[0], n[1]))(numbers)
        found.append(at)
    return found


def test_accuracy_stands_over_mean_tokens_with_its_interval(run, rows):
    drawing = Drawing(charts.accuracy_by_tokens(rows, several_runs=False))
    for variant in ("base", "converted", "trained"):
        scores = read_scores(run / "eval" / variant / "ledger/scores.json")
        (group,) = drawing.groups(f"v-{variant}")
        point, (whisker, *_) = group.find("circle"), group.findall("line")
        assert drawing.x(float(point.get("cx"))) == pytest.approx(scores.tokens_per_sample, abs=0.5)
        assert drawing.y(float(point.get("cy"))) == pytest.approx(100 * scores.accuracy, abs=0.2)
        ends = [drawing.y(float(whisker.get(end))) for end in ("y1", "y2")]
        assert ends == pytest.approx([100 * scores.interval.low, 100 * scores.interval.high], abs=0.2)
        assert f"{100 * scores.accuracy:.1f} % right" in point.find("title").text


def test_a_budget_of_tokens_buys_the_answers_that_are_right_within_it(rows):
    drawing = Drawing(charts.accuracy_within_budget(rows, several_runs=False), log_x=True)
    for variant, records in ANSWERS.items():
        (group,) = drawing.groups(f"v-{variant}")
        corners = [(drawing.x(x), drawing.y(y)) for x, y in points(group.find("path").get("d"))]
        for budget in (62, 68, 95, 105, 150, 205, 400, 520):
            shown = next((y for x, y in reversed(corners) if x <= budget), 0.0)
            assert shown == pytest.approx(100 * sum(r.correct and r.tokens <= budget for r in records) / len(records), abs=0.2)


def test_histograms_count_every_sample_once_by_length_and_outcome(rows):
    found = charts.trace_lengths(rows, several_runs=False)
    for chart, (variant, records) in zip(found, ANSWERS.items(), strict=True):
        drawing = Drawing(chart, log_x=True)
        for outcome, css in (("right", "o-right"), ("wrong", "o-wrong"), ("cut off", "o-cut-off")):
            bars = [bar for bar in drawing.root.iter("rect") if css in bar.get("class")]
            wanted = [r.tokens for r in records if charts.outcome(r) == outcome]
            heights = [drawing.y(0) - drawing.y(float(bar.get("height"))) for bar in bars]
            assert sum(heights) == pytest.approx(len(wanted), abs=0.05), (variant, outcome)
            spans = [(float(bar.get("x")), float(bar.get("x")) + float(bar.get("width"))) for bar in bars]
            for tokens in wanted:
                assert any(drawing.x(left - 1) <= tokens <= drawing.x(right + 1) for left, right in spans)


def test_a_cut_answer_is_neither_right_nor_wrong_in_a_histogram_and_is_named(rows):
    captions = [chart.caption for chart in charts.trace_lengths(rows, several_runs=False)]
    assert captions == [
        "3 right, 1 wrong; median 90 tokens",
        "1 right, 2 wrong, 1 cut off; median 80 tokens",
        "3 right, 1 wrong; median 95 tokens",
    ]


def test_histogram_bars_say_what_they_hold(rows):
    titles = [title for chart in charts.trace_lengths(rows, several_runs=False) for title in Drawing(chart).titles()]
    assert "1 cut off, 512 to 608 tokens" in titles  # a quarter of a doubling from 512: up to 608.87


@pytest.mark.parametrize("tokens", [[1], [1, 1], [82, 82], [1, 131072], [7, 8]])
def test_any_lengths_have_a_histogram(rows, tokens):
    samples = tuple(record("p0", sample=number, tokens=count) for number, count in enumerate(tokens))
    (chart,) = charts.trace_lengths([replace(rows[0], samples=samples)], several_runs=False)
    counted = sum(int(title.split()[0]) for title in Drawing(chart).titles())
    assert counted == len(tokens)


def test_kv_bytes_grow_as_the_cache_does(contents):
    drawing = Drawing(run_charts.kv_growth(contents))
    pixel = kv_bytes(contents.config, 0, 32768) / 200
    unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[next(t.text for t in drawing.root.iter("text") if "KV" in t.text)[-3:]]
    for css, lazy in (("v-base", 0), ("v-trained", 2)):
        (group,) = drawing.groups(css)
        for x, y in points(group.find("path").get("d"))[1::8]:
            tokens = drawing.x(x)
            assert drawing.y(y) * unit == pytest.approx(kv_bytes(contents.config, lazy, round(tokens)), abs=pixel)
        point = group.find("circle")
        assert drawing.x(float(point.get("cx"))) == pytest.approx(32768, rel=1e-3)
        assert drawing.y(float(point.get("cy"))) * unit == pytest.approx(kv_bytes(contents.config, lazy, 32768), rel=5e-3)


def test_the_layer_profile_shows_mean_and_middle_half_and_marks_the_layers(contents):
    for chart, scores in zip(run_charts.layer_scores(contents, contents.profile), (REACH, LAZY_RATIO), strict=True):
        drawing, scores_SL = Drawing(chart), np.array(scores)
        layers = drawing.groups("layer")
        assert [group.get("class") for group in layers] == [
            "layer v-trained", "layer v-base", "layer v-trained", "layer v-base"
        ]  # fmt: skip
        for layer, group in enumerate(layers):
            point, spread = group.find("circle"), next(line for line in group.findall("line") if line.get("class") == "spread")
            assert drawing.x(float(point.get("cx"))) == pytest.approx(layer, abs=0.01)
            assert drawing.y(float(point.get("cy"))) == pytest.approx(scores_SL[:, layer].mean(), abs=0.005)
            ends = [drawing.y(float(spread.get(end))) for end in ("y1", "y2")]
            assert ends == pytest.approx(np.quantile(scores_SL[:, layer], [0.25, 0.75]), abs=0.005)


def test_the_layers_that_a_strategy_would_choose_are_tinted(contents):
    tinted = []
    for chart in run_charts.layer_scores(contents, contents.profile):
        groups = Drawing(chart).groups("layer")
        tinted.append([n for n, group in enumerate(groups) if any(r.get("class") == "tint" for r in group.findall("rect"))])
    assert tinted == [list(contents.profile.choose("reach", 2)), list(contents.profile.choose("lazy_ratio", 2))]


def test_losses_are_drawn_at_their_steps(contents):
    drawing = Drawing(run_charts.loss_curve(contents))
    (training,), (heldout,) = drawing.groups("v-base"), drawing.groups("v-trained")
    corners = [(drawing.x(x), drawing.y(y)) for x, y in points(training.find("path").get("d"))]
    assert [value for corner in corners for value in corner] == pytest.approx([1, 2.0, 2, 1.5, 3, 1.0], abs=0.01)
    (point,) = heldout.findall("circle")
    assert (drawing.x(float(point.get("cx"))), drawing.y(float(point.get("cy")))) == pytest.approx((2, 1.75), abs=0.01)


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
    drawing = Drawing(chart, log_y=True)
    (line,) = drawing.groups("v-trained")
    corners = [(drawing.x(x), drawing.y(y)) for x, y in points(line.find("path").get("d"))]
    assert [value for corner in corners for value in corner] == pytest.approx([1, 0.5, 2, 0.05, 3, 0.005], rel=0.01)
    assert "KL(teacher || model): 0.5 at step 1, 0.005 at step 3" in drawing.titles()
    assert "temperature 1," in chart.caption


def test_of_a_distilled_training_the_cross_entropy_is_held_against_the_held_out_loss(distilled):
    drawing = Drawing(run_charts.loss_curve(read_runs([distilled])[0]))
    (training,) = drawing.groups("v-base")
    corners = [drawing.y(y) for _, y in points(training.find("path").get("d"))]
    assert corners == pytest.approx([1, 1 / 2, 1 / 3], abs=0.01)


def test_the_page_of_a_distilled_training_has_both_charts_and_another_has_none_of_divergence(distilled, tmp_path):
    titles = [chart.title for chart in run_part(read_runs([distilled])[0]).charts]
    assert titles == ["KV cache against length", "Losses of the training", "Divergence from the teacher"]
    plain = read_runs([made_run(tmp_path / "others", "plain")])[0]
    assert run_charts.divergence_curve(plain) is None


def test_divergences_without_a_logarithm_are_left_out_and_counted(distilled):
    append_json_line(distilled / "train/log.jsonl", {"step": 4, "kl": 0.0})
    append_json_line(distilled / "train/log.jsonl", {"step": 5, "kl": math.nan})
    chart = run_charts.divergence_curve(read_runs([distilled])[0])
    assert chart.caption.endswith("2 logged values are not above 0, or not finite, and not drawn.")


def test_probes_are_drawn_at_their_steps_with_their_intervals(run):
    for step, needle, copying in ((2, 0.25, 1.0), (4, 0.5, 0.75)):
        scores = tuple(ProbeScore(name, right, 0.125, 8, 0.25) for name, right in (("needle", needle), ("copying", copying)))
        write_result(run / "train", ProbeResult(step, scores, ()))
    chart = run_charts.probe_curves(read_runs([run])[0])
    assert [entry.label for entry in chart.legend] == ["needle: 8 problems", "copying: 8 problems"]
    drawing = Drawing(chart)
    (needle,), (copying,) = drawing.groups("p-0"), drawing.groups("p-1")
    corners = [(drawing.x(x), drawing.y(y)) for x, y in points(needle.find("path").get("d"))]
    assert [value for corner in corners for value in corner] == pytest.approx([2, 25, 4, 50], abs=0.5)
    bars = [[drawing.y(float(bar.get(end))) for end in ("y1", "y2")] for bar in copying.findall("line")]
    assert [value for bar in bars for value in bar] == pytest.approx([67.6, 100, 40.9, 92.9], abs=0.5)  # Wilson's of 8 and 6 of 8
    assert (
        "needle: 50.0 % of 8 problems at step 4; 95 % interval 21.5 to 78.5 %; 25.0 % of the answers were cut off"
        in drawing.titles()
    )


def test_probes_that_find_the_same_do_not_hide_each_other(run):
    scores = tuple(ProbeScore(name, 0.0, 0.0, 8, 0.0) for name in ("needle", "copying", "ledger"))
    write_result(run / "train", ProbeResult(2, scores, ()))
    drawing = Drawing(run_charts.probe_curves(read_runs([run])[0]))
    bars = [drawing.groups(f"p-{number}")[0].find("line") for number in range(3)]
    places = [float(bar.get("x1")) for bar in bars]
    assert places == sorted(set(places)) and min(b - a for a, b in itertools.pairwise(places)) >= 6
    assert all(abs(float(bar.get("y1")) - float(bar.get("y2"))) > 20 for bar in bars)  # none of 8 right is no certainty


def test_a_run_without_probes_has_no_chart_of_them(contents):
    assert run_charts.probe_curves(contents) is None


def test_losses_that_are_not_finite_are_left_out_and_counted(run):
    append_json_line(run / "train/log.jsonl", {"step": 4, "loss": math.nan})
    chart = run_charts.loss_curve(read_runs([run])[0])
    assert chart.caption == "1 logged losses are not finite and not drawn."
    assert "nan" not in str(chart.svg).lower()


def test_several_runs_are_told_apart_by_name_and_shape(tmp_path):
    runs = read_runs([made_run(tmp_path, "one"), made_run(tmp_path, "two")])
    rows = [each for run in runs for each in run.measured if each.result.evaluation == "ledger"]
    chart = charts.accuracy_by_tokens(rows, several_runs=True)
    assert [entry.label for entry in chart.legend] == [
        f"{run}: {label}" for run in ("one", "two") for label in ("base", "hybrid by reach, untrained", "hybrid by reach, trained")
    ]
    groups = Drawing(chart).groups("v-trained")
    assert [bool(group.findall("circle")) for group in groups] == [True, False]
