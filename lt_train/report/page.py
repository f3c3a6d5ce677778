"""The page: templates filled in, styles and script inside, nothing fetched from elsewhere."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from lt_train import __version__
from lt_train.evaluation.scores import AnswerScores
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.evaluations import CONVERTED
from lt_train.recipe.schema import PER_PROMPT
from lt_train.report import charts, run_charts
from lt_train.report.browser import sample_browser
from lt_train.report.charts import Chart
from lt_train.report.contents import EvaluatedVariant, Run
from lt_train.report.provenance import provenance, stage_times
from lt_train.report.results import cache_bytes
from lt_train.report.tables import ResultTable, result_table
from lt_train.runtime.drawing import PALETTE
from lt_train.runtime.units import format_bytes
from lt_train.selection.chosen import streaming_count


@dataclass(frozen=True)
class EvaluationPart:
    name: str
    table: ResultTable
    charts: tuple[Chart, ...]
    histograms: tuple[Chart, ...]


@dataclass(frozen=True)
class RunPart:
    name: str
    folder: str
    unfinished: str | None
    summary: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]
    stages: tuple[tuple[str, str, str], ...]
    recipe: str


def render(runs: Sequence[Run]) -> str:
    """The page as text that can be written as UTF-8."""
    script = asset("browser.js")
    page = _template().render(
        title=", ".join(run.name for run in runs),
        evaluations=evaluation_parts(runs),
        runs=[run_part(run) for run in runs],
        browser=sample_browser(runs),
        palette=PALETTE,
        style=asset("style.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a trace may hold half a character


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("lt_train.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def asset(name: str) -> Markup:
    return Markup(resources.files("lt_train.report").joinpath("templates", name).read_text(encoding="utf-8"))


def evaluation_parts(runs: Sequence[Run]) -> list[EvaluationPart]:
    several = len(runs) > 1
    by_name: dict[tuple[str, bool], list[EvaluatedVariant]] = {}
    for run in runs:
        for each in run.measured:
            by_name.setdefault((each.result.evaluation, isinstance(each.result.scores, AnswerScores)), []).append(each)
    return [evaluation_part(name, rows, several) for (name, _), rows in by_name.items()]


def evaluation_part(name: str, rows: Sequence[EvaluatedVariant], several: bool) -> EvaluationPart:
    table, drawn = result_table(rows, several), []
    with_samples = [each for each in rows if each.samples]
    if isinstance(rows[0].result.scores, AnswerScores):
        drawn.append(charts.accuracy_by_tokens(rows, several))
    if with_samples and all(record.score in (0, 1) for each in with_samples for record in each.samples):
        drawn.append(charts.accuracy_within_budget(with_samples, several))
    histograms = charts.trace_lengths(with_samples, several) if with_samples else []
    return EvaluationPart(name, table, tuple(drawn), tuple(histograms))


def run_part(run: Run) -> RunPart:
    training = run_charts.training_curves(run)
    profile = None if run.profile is None else run_charts.layer_profile(run, run.profile)
    curve = None if run.profile is None else run_charts.predicted_rise(run, run.profile)
    drawn = (profile, curve, training, run_charts.kv_growth(run), run_charts.divergence_curve(run), run_charts.probe_curves(run))
    notes = []
    if run.profile is None:
        notes.append("No layer profile: the recipe names the layers, or its strategy needs no scores.")
    if training is None:
        untrained = f"No losses: this hybrid was not trained{' yet' * (run.settings.get('train') is not None)}."
        notes.append("No loss of the training is finite." if run.log else untrained)
    return RunPart(
        name=run.name,
        folder=str(run.folder),
        unfinished=run.unfinished,
        summary=tuple(summary(run)),
        charts=tuple(chart for chart in drawn if chart is not None),
        notes=tuple(notes),
        provenance=tuple(provenance(run)),
        stages=tuple(stage_times(run)),
        recipe=run.recipe,
    )


def summary(run: Run) -> list[tuple[str, str]]:
    """The run in short: base, layers, window, training, KV cache."""
    spec, by_prompts = run.spec(CONVERTED), run.setting("hybrid", "select") == PER_PROMPT
    chosen_by = "each prompt" if by_prompts else run.setting("hybrid", "strategy") or "the recipe"
    unit = "KV head" if spec.split_layers else "layer"
    found = [
        ("base", str(run.setting("model", "base"))),
        ("streams", f"{streaming_count(spec, run.kv_heads)}, chosen by {chosen_by}"),
        (f"a streaming {unit} sees", f"{_sinks(run.config)} and {spec.w_recent:,} recent tokens"),
    ]
    if run.profile is not None and "gates" in run.profile.strategies and not by_prompts:
        rise, every = run.profile.predicted_rise(spec), run.profile.mean_all_streaming("gates")
        found.append(("predicted rise", f"{rise:+.3g} nats on long-reach tokens, untrained ({every:+.3g} if every layer streamed)"))
    steps = max((row["step"] for row in run.log), default=0)
    training = f"{run.setting('train', 'method')}, {steps:,} steps, on {run.setting('data', 'source')}" if steps else "none"
    hybrid, base = (cache_bytes(run.config, each, KV_TOKENS) for each in (spec, spec.all_full))
    return [
        *found,
        ("training", training),
        (
            f"KV cache at {KV_TOKENS // 1024}K",
            f"{format_bytes(hybrid)} instead of {format_bytes(base)}, {100 * hybrid / base:.0f} %",
        ),
    ]


def _sinks(config: Mapping[str, Any]) -> str:
    return "a learned sink" if config.get("learned_sinks") else f"{config['w_sink']} sink"
