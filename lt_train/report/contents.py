"""The contents of a report, read from run folders."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_train.evaluation.records import SampleRecord
from lt_train.evaluation.scores import AnswerScores, Scores
from lt_train.hybrid.kv_size import kv_heads
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.evaluations import BASE
from lt_train.recipe.part import former_names
from lt_train.recipe.schema import Recipe
from lt_train.recipe.yaml_text import read_recipe_text
from lt_train.report.problems import KnownProblems, known_problems
from lt_train.report.results import Result, read_results, results_as_json, spec_as_run
from lt_train.report.samples import read_samples
from lt_train.report.stages import FinishedStage, described, finished_stages, missing
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import RunPaths
from lt_train.selection.chosen import Chosen, read_chosen
from lt_train.selection.profile import LayerProfile
from lt_train.training.log import read_log
from lt_train.training.probes.results import ProbeResult, read_probes


@dataclass(frozen=True)
class EvaluatedVariant:
    """One variant of one run under one evaluation.

    Attributes:
        run_number: from 0, in the order of the command line.
        base: the base's scores of the same run and evaluation; None: not measured.
        samples: all that the scores count; empty where there are none (a loss, or the files are gone).
    """

    run: str
    run_number: int
    result: Result
    base: Scores | None
    samples: tuple[SampleRecord, ...]


@dataclass(frozen=True)
class Run:
    """A run folder's contents.

    Attributes:
        settings: of its recipe, under the names of today. recipe: the text of recipe.yaml.
        config: hybrid/config.json. chosen: hybrid/layers.json, what streams by variant.
        profile: None where the recipe names the layers.
        problems: the problems of each evaluation.
        log: rows of train/log.jsonl; none without training. probes: of its checkpoints, in their order.
        stages: those that are done. missing: the others that the recipe requests; none: the run is finished.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    recipe: str
    config: Mapping[str, Any]
    chosen: Mapping[str, Chosen]
    measured: tuple[EvaluatedVariant, ...]
    problems: Mapping[str, KnownProblems]
    profile: LayerProfile | None
    log: tuple[Mapping[str, Any], ...]
    probes: tuple[ProbeResult, ...]
    stages: tuple[FinishedStage, ...]
    missing: tuple[str, ...]

    @property
    def unfinished(self) -> str | None:
        """The finished and the missing stages of an unfinished run, in one sentence; None: it is finished."""
        return described(self.folder, self.stages, self.missing) if self.missing else None

    def spec(self, variant: str) -> HybridSpec:
        """The spec of a hybrid; where each prompt chooses, as many layers, no matter which."""
        return spec_as_run(self.config, self.chosen[variant], self.settings["hybrid"])

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer."""
        return kv_heads(self.config)

    def setting(self, part: str, name: str) -> Any:
        """A setting of the recipe; None where the recipe has no such part."""
        return (self.settings.get(part) or {}).get(name)


@dataclass(frozen=True)
class RunResults:
    """The results of a run so far, as plain data.

    Attributes:
        scores: one dictionary for each evaluated variant, as `lt-train show --json` prints them: `variant` (base, converted,
            trained, converted-by-<strategy>), `label`, `evaluation`, `kind` (answers or loss), `scores` with the names of
            scores.json (of answers: accuracy, interval, standard_error, truncated, …; of a loss: loss, standard_error, …),
            `layers` and `streaming_kv_heads` (see Result), `streaming` (these in words), `num_layers`, `strategy`, `kv_bytes`.
        profile: the scores of the layers; None where the recipe names the layers, or none are scored yet.
        layers: the layers that stream, by variant; where layers are split, for each layer its KV heads that stream. Empty before
            the base is converted.
        curves: (step, value) in the order of the steps, by the names of the trackers: "train/loss", "train/eval_loss",
            "train/learning_rate", …, "probes/<name>".
    """

    folder: Path
    scores: tuple[Mapping[str, Any], ...]
    profile: LayerProfile | None
    layers: Mapping[str, tuple[int, ...] | tuple[tuple[int, ...], ...]]
    curves: Mapping[str, tuple[tuple[int, float], ...]]


def read_run_results(folder: Path) -> RunResults:
    """
    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    paths, results = RunPaths(folder), read_results(folder)
    layers = read_chosen(paths.layers) if paths.layers.is_file() else {}
    return RunResults(
        folder=folder,
        scores=tuple(results_as_json(results)),
        profile=LayerProfile.load(paths.layer_profile) if paths.layer_profile.exists() else None,
        layers={variant: _as_tuples(chosen) for variant, chosen in layers.items()},
        curves={name: tuple(points) for name, points in _curves(paths).items()},
    )


def _as_tuples(chosen: Chosen) -> tuple[Any, ...]:
    return tuple(each if isinstance(each, int) else tuple(each) for each in chosen)


def _curves(paths: RunPaths) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_training_log(paths.training_log):
        for name, value in row.items():
            if name != "step":
                found.setdefault(f"train/{name}", []).append((row["step"], value))
    for probe in read_probes(paths.train):
        for score in probe.scores:
            found.setdefault(f"probes/{score.probe}", []).append((probe.step, score.accuracy))
    return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """
    Raises:
        UserError: no folder, the same one twice, no run in one of them, a run without scores, or a damaged file.
    """
    if not folders:
        raise UserError("RUN: missing. Fix: name one or more run folders, such as runs/quickstart")
    for folder in folders:
        if [*map(os.path.realpath, folders)].count(os.path.realpath(folder)) > 1:
            raise UserError(f"RUN: {folder}: named twice. Fix: name every run once")
    names = run_names(folders)
    return [read_run(folder, name, number) for number, (folder, name) in enumerate(zip(folders, names, strict=True))]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, or its full path where two have one name."""
    names = [os.path.basename(os.path.realpath(folder)) for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def read_run(folder: Path, name: str, number: int) -> Run:
    paths, results = RunPaths(folder), read_results(folder)
    recipe = paths.recipe.read_text(encoding="utf-8")  # read_results has found it valid
    settings = read_recipe_text(recipe, former_names=former_names(Recipe)).values
    log, stages = read_training_log(paths.training_log), finished_stages(paths)
    absent = missing(settings, stages, results, logged_steps=max((row["step"] for row in log), default=0))
    if not results:
        state = described(folder, stages, absent)
        raise UserError(f"RUN: {folder}: no scores yet: {state}. Fix: measure first, with lt-train eval {paths.recipe}")
    measured = tuple(measure(paths, name, number, result, results) for result in results)
    return Run(
        name=name,
        folder=folder,
        settings=settings,
        recipe=recipe,
        config=read_json(paths.hybrid_config, "hybrid config"),
        chosen=read_chosen(paths.layers),
        measured=measured,
        problems=problems_by_evaluation(settings, measured),
        profile=LayerProfile.load(paths.layer_profile) if paths.layer_profile.exists() else None,
        log=tuple(log),
        probes=tuple(read_probes(paths.train)),
        stages=stages,
        missing=absent,
    )


def measure(paths: RunPaths, name: str, number: int, result: Result, results: Sequence[Result]) -> EvaluatedVariant:
    base = next((r.scores for r in results if (r.variant, r.evaluation) == (BASE, result.evaluation)), None)
    place = paths.evaluation(result.variant, result.evaluation)
    samples = read_samples(place, result.scores) if isinstance(result.scores, AnswerScores) else ()
    return EvaluatedVariant(name, number, result, base, samples)


def problems_by_evaluation(settings: Mapping[str, Any], measured: Sequence[EvaluatedVariant]) -> dict[str, KnownProblems]:
    eval_configs = {eval_config["name"]: eval_config for eval_config in settings["eval"]}
    scores = {each.result.evaluation: each.result.scores for each in measured if isinstance(each.result.scores, AnswerScores)}
    return {evaluation: known_problems(eval_configs[evaluation], found) for evaluation, found in scores.items()}


def read_training_log(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_log(path)
        damaged = next((row for row in rows if not isinstance(row.get("step"), int)), None)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a valid training log ({error}). Fix: remove the damaged row") from error
    if damaged is not None:
        raise UserError(f"{path}: not a valid training log (a row without a step: {damaged}). Fix: remove that row")
    return rows
