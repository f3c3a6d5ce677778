"""The results of a run: its scores side by side, each with its uncertainty and its difference from the base."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lt_train.evaluation.scores import AnswerScores, LossScores, Scores, read_scores
from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.kv_size import KV_TOKENS, kv_bytes, kv_heads, saved_itemsize
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.schema import PER_PROMPT, converted_by
from lt_train.report.formatting import difference_from, problems_and_sampling
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import MEASURED, RunPaths
from lt_train.runtime.units import format_bytes
from lt_train.selection.choose import number_by_ratio
from lt_train.selection.chosen import Chosen, describe_streaming, read_chosen, spec_of

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has libyaml

BY_HEAD = " by head"
"""What follows the strategy in the label of a hybrid with split layers."""


@dataclass(frozen=True)
class Result:
    """One variant under one evaluation."""

    variant: str
    evaluation: str
    scores: Scores
    layers: tuple[int, ...]
    """Those that stream with all their KV heads."""
    num_layers: int
    """Those that can stream: all that have full attention in the base."""
    strategy: str | None
    """Chose the layers of the recipe's own hybrid; None: the recipe names them."""
    kv_bytes: int
    """KV cache of one sequence of KV_TOKENS tokens, in the dtype of the base's weights."""
    streaming: str
    """What streams, in words."""
    streaming_kv_heads: tuple[tuple[int, ...], ...] | None = None
    """By layer, the KV heads that stream; None where no layer is split."""

    @property
    def label(self) -> str:
        """The variant's name in tables and charts: "base", or what chose a hybrid's layers, and whether it is trained."""
        if self.variant == BASE:
            return "base"
        chosen_by = self.strategy if self.variant in (CONVERTED, TRAINED) else self.variant.removeprefix(converted_by(""))
        chosen_by = f"{chosen_by or 'hybrid'}{BY_HEAD if self.streaming_kv_heads else ''}"
        return f"{chosen_by}, {'trained' if self.variant == TRAINED else 'untrained'}"


def read_results(run: Path) -> list[Result]:
    """All scores of a run so far, in the order of the table.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    paths = RunPaths(run)
    if not paths.recipe.is_file():
        raise UserError(f"RUN: {run}: no run: {paths.recipe} is missing. Fix: start it with lt-train run RECIPE")
    if not paths.hybrid_config.is_file():
        return []
    layers = read_chosen(paths.layers)
    sizes = read_json(paths.hybrid_config, "hybrid config")
    order = [BASE, *[name for name in layers if name != CONVERTED], CONVERTED, TRAINED]
    evaluations, hybrid = _evaluations_and_hybrid(paths.recipe)
    strategy = hybrid["strategy"] if hybrid.get("select") != PER_PROMPT else PER_PROMPT
    results, heads = [], kv_heads(sizes)
    for evaluation in evaluations:
        for variant in order:
            path = paths.scores(variant, evaluation)
            if path.is_file():
                chosen = layers[CONVERTED if variant in (BASE, TRAINED) else variant]
                spec = spec_as_run(sizes, chosen, hybrid)
                spec = spec.all_full if variant == BASE else spec
                result = Result(
                    variant,
                    evaluation,
                    read_scores(path),
                    spec.lazy_layers if chosen else (),
                    len(spec.full_in_base),
                    strategy,
                    cache_bytes(sizes, spec, KV_TOKENS),
                    describe_streaming(spec, heads),
                    tuple(spec.streaming_heads(heads)) if spec.split_layers else None,
                )
                results.append(result)
    return results


def spec_as_run(config: Mapping[str, Any], chosen: Chosen, hybrid: Mapping[str, Any]) -> HybridSpec:
    """The spec of a hybrid of a run.

    Args:
        config: hybrid/config.json. chosen: of hybrid/layers.json; nothing where each prompt chooses: then as many layers as it
            chooses, no matter which. hybrid: the recipe's part.
    """
    base = base_spec(config)
    chosen = chosen or range(number_by_ratio(hybrid["lazy_layer_ratio"], base.num_layers))
    w_recent = config["sliding_window"] if config.get("w_recent") is None else config["w_recent"]
    return spec_of(chosen, base.num_layers, kv_heads(config), config["w_sink"], w_recent).on(base)


def full_kv_bytes(run: Path) -> int:
    """KV cache of one sequence of KV_TOKENS tokens in the base."""
    config = read_json(RunPaths(run).hybrid_config, "hybrid config")
    return cache_bytes(config, base_spec(config), KV_TOKENS)


def cache_bytes(config: Mapping[str, Any], spec: HybridSpec, tokens: int) -> int:
    """Bytes of one sequence's KV cache, in the dtype of a hybrid's config.json."""
    return kv_bytes(config, spec, tokens, saved_itemsize(config))


def show_results(run: Path, console: Console) -> None:
    """Print a table for each evaluation, and the paths of pictures and checkpoints."""
    results = read_results(run)
    if not results:
        console.print(f"{run}: no scores yet", markup=False, highlight=False, soft_wrap=True)
    for evaluation in dict.fromkeys(result.evaluation for result in results):
        rows = [result for result in results if result.evaluation == evaluation]
        console.print(_title(rows), style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(results_table(rows))
        for row in _measured_otherwise(rows):
            console.print(row, markup=False, highlight=False, soft_wrap=True)
    if results:
        console.print(f"{f'KV at {KV_TOKENS // 1024}K':<14}{_kv_line(results)}", markup=False, highlight=False, soft_wrap=True)
    if line := trained_weights(run):
        console.print(f"{'trained model':<14}{line}", markup=False, highlight=False, soft_wrap=True)
    paths = RunPaths(run)
    made = (
        ("layer profile", paths.profile_picture),
        ("predicted", paths.curve_picture),
        ("training log", paths.training_log),
        ("checkpoint", paths.export),
    )
    for label, path in made:
        if path.exists():
            console.print(f"{label:<14}{path}", markup=False, highlight=False, soft_wrap=True)


def trained_weights(run: Path) -> str | None:
    """The step whose weights the trained model has, and why; None before there is one."""
    paths = RunPaths(run)
    if not paths.trained_manifest.is_file():
        return None
    step = read_json(paths.trained_manifest, "checkpoint manifest")["step"]
    if not (paths.trained / MEASURED).is_file():
        return f"weights of step {step:,}, the last"
    measured = read_json(paths.trained / MEASURED, "record of what was measured")
    return f"weights of step {step:,}, the best by {measured['metric']} ({measured['value']:.4g})"


def results_table(results: list[Result]) -> Table:
    """One evaluation's variants, a row each."""
    generated = isinstance(results[0].scores, AnswerScores)
    failures = any(isinstance(result.scores, AnswerScores) and result.scores.grading_errors for result in results)
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("model")
    for name in (
        "accuracy, % [95 %]" if generated else "nats per token ± SE",
        "minus base [95 %]",
        *(["trunc.", "no\nanswer"] if generated else []),
        *(["not\ngraded"] if failures else []),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    base = next((result.scores for result in results if result.variant == BASE), None)
    for result in results:
        row = [result.label, _score(result.scores)]
        row.append("" if result.variant == BASE or base is None else difference_from(result.scores, base)[0])
        if isinstance(result.scores, AnswerScores):
            row += [f"{100 * result.scores.truncated:.1f}%", f"{100 * result.scores.unanswered:.1f}%"]
            row += [f"{result.scores.grading_errors:,}"] if failures else []
        table.add_row(*row)
    return table


def _kv_line(results: list[Result]) -> str:
    """In a run all hybrids of entire layers stream equally many of them, so they have one size."""

    def name(result: Result) -> str:
        return "base" if result.variant == BASE else "hybrid of KV heads" if result.streaming_kv_heads else "hybrids"

    sizes = {name(result): format_bytes(result.kv_bytes) for result in results}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def results_as_json(results: list[Result]) -> list[dict[str, object]]:
    """Every score with its uncertainty, without rounding; `scores` has the names of scores.json."""
    return [{**asdict(result), "label": result.label, "kind": result.scores.kind} for result in results]


TRACKED_COLUMNS = [
    "model",
    "accuracy, % [95 %] | nats ± SE",
    "minus base [95 %]",
    "truncated",
    "tokens per answer",
    "unanswered",
    "not graded",
    f"KV bytes at {KV_TOKENS}",
]


def tracked_rows(results: list[Result]) -> list[list[str | float | None]]:
    """One evaluation's variants as the rows of a table for tracking, with TRACKED_COLUMNS."""
    base = next((result.scores for result in results if result.variant == BASE), None)
    rows: list[list[str | float | None]] = []
    for result in results:
        scores = result.scores
        answers: list[float | None] = [None] * 4
        if isinstance(scores, AnswerScores):
            answers = [scores.truncated, scores.tokens_per_sample, scores.unanswered, scores.grading_errors]
        minus_base = None if result.variant == BASE or base is None else difference_from(scores, base)[0]
        rows.append([result.label, _score(scores), minus_base, *answers, result.kv_bytes])
    return rows


def summary_values(results: list[Result]) -> dict[str, float]:
    """The final scores by name, for tracking: "trained/ledger/accuracy" and the like."""
    values: dict[str, float] = {}
    for result in results:
        name, scores = f"{result.variant}/{result.evaluation}", result.scores
        if scores.standard_error is not None:
            values[f"{name}/standard_error"] = scores.standard_error
        values[f"{result.variant}/kv_bytes_at_{KV_TOKENS}"] = result.kv_bytes
        if isinstance(scores, AnswerScores):
            values[f"{name}/accuracy"] = scores.accuracy
            values[f"{name}/majority"] = scores.majority
            values[f"{name}/truncated"] = scores.truncated
            values[f"{name}/unanswered"] = scores.unanswered
            values[f"{name}/tokens_per_second"] = scores.tokens_per_second
        else:
            values[f"{name}/{'kl' if scores.is_divergence else 'loss'}"] = scores.loss
    return values


def _evaluations_and_hybrid(recipe: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of the evaluations, and the hybrid part."""
    try:
        settings = yaml.load(recipe.read_text(encoding="utf-8"), Loader=_YAML_LOADER)
        return [eval_config["name"] for eval_config in settings["eval"]], {"strategy": None, **settings["hybrid"]}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = "it lacks the settings of a run" if isinstance(error, KeyError | TypeError) else error
        raise UserError(f"{recipe}: not a valid recipe ({reason}). Fix: delete it and run again, which writes it again") from error


def _title(results: list[Result]) -> str:
    first, scores = results[0], results[0].scores
    layers = next((f"; hybrids stream {len(r.layers)} of {r.num_layers} layers" for r in results if r.layers), "")
    streaming = next((f"; {result.streaming}" for result in results if result.streaming_kv_heads), layers)
    if isinstance(scores, LossScores):
        what = "KL(base || model) over " if scores.is_divergence else ""
        return f"{first.evaluation}: {what}{_described(scores)}{streaming}"
    metrics = "" if scores.fingerprint["temperature"] == 0 else " (avg@n, maj@n)"
    truncated = f"; {scores.truncated_text}" if any(_is_truncated(result.scores) for result in results) else ""
    return f"{first.evaluation}: {problems_and_sampling(scores)}{metrics}{streaming}{truncated}"


def _measured_otherwise(results: list[Result]) -> list[str]:
    """The rows whose problems or sampling are not those of the title: the evaluation was changed before all variants had it."""
    first, *described = [_described(result.scores) for result in results]
    pairs = zip(results[1:], described, strict=True)
    return [f"measured otherwise: {result.label}: {text}" for result, text in pairs if text != first]


def _described(scores: Scores) -> str:
    if isinstance(scores, LossScores):
        return f"{scores.samples} samples, {scores.tokens:,} answer tokens"
    return f"{problems_and_sampling(scores)}; {scores.truncated_text}"


def _is_truncated(scores: Scores) -> bool:
    return isinstance(scores, AnswerScores) and scores.truncated > 0


def _score(scores: Scores) -> str:
    if isinstance(scores, LossScores):
        return scores.text
    span = "" if scores.interval is None else f" [{100 * scores.interval.low:.1f}, {100 * scores.interval.high:.1f}]"
    majority = f", maj {100 * scores.majority:.1f}" if scores.samples > 1 else ""
    partial = f", PARTIAL: {scores.missing:,} samples missing" if scores.partial else ""
    return f"{100 * scores.accuracy:.1f}{span}{majority}{partial}"
