"""Where an export comes from: gathered from the recipe and the results of its run."""

from pathlib import Path

from lt_train.benchmarks import BENCHMARKS
from lt_train.evaluation.scores import AnswerScores
from lt_train.export.metadata import ExportMetadata, ReportedScore
from lt_train.pipeline.run_folder import package_versions
from lt_train.recipe.schema import Recipe
from lt_train.report.results import Result, read_results


def export_metadata(recipe: Recipe, run: Path, data_counts: dict[str, int], default_system_turn: str = "") -> ExportMetadata:
    hybrid = recipe.hybrid
    return ExportMetadata(
        recipe=recipe.name,
        base=recipe.model.base,
        base_revision=recipe.model.revision,
        selection=hybrid.strategy or "given in the recipe",
        data=recipe.data.source or hybrid.calibration.source,
        data_format=recipe.data.format,
        data_counts=data_counts,
        training=_training(recipe),
        scores=tuple(_score(result) for result in read_results(run)),
        versions=dict(package_versions()),
        system=recipe.prompt.system,
        default_system_turn=default_system_turn,
    )


def _training(recipe: Recipe) -> dict[str, str | int | float | bool | None] | None:
    """The settings that shape a training, flat; those of its logging and saving are left out."""
    if recipe.train is None:
        return None
    names = ["method", "learning_rate", "epochs", "max_steps", "batch_size", "batch_tokens"]
    names += ["lr_scheduler", "warmup_ratio", "weight_decay"]
    settings = {name: getattr(recipe.train, name) for name in names if getattr(recipe.train, name) is not None}
    settings |= {"max_length": recipe.data.max_length, "packing": recipe.data.packing}
    if recipe.train.parameters != "all":
        settings["parameters"] = recipe.train.parameters
    if recipe.train.restore_query_key:
        settings["queries and keys of full-attention layers"] = "the base's, put back after training"
    if recipe.train.distill.weight > 0:
        given = recipe.train.distill.model_dump(exclude={"top_k"} if recipe.train.distill.teacher != "top_k" else set())
        settings |= {f"distill_{name}": value for name, value in given.items()}
    if recipe.lora is not None:
        settings |= {"lora_rank": recipe.lora.rank, "lora_alpha": recipe.lora.alpha, "lora_layers": recipe.lora.layers}
    return settings


def _score(result: Result) -> ReportedScore:
    scores = result.scores
    if isinstance(scores, AnswerScores):
        metric, value, n = _answer_metric(scores), scores.accuracy, scores.problems
    else:
        metric, value, n = "KL to base" if scores.is_divergence else "loss", scores.loss, scores.samples
    span = None if scores.interval is None else (scores.interval.low, scores.interval.high)
    return ReportedScore(result.variant, result.evaluation, metric, value, scores.standard_error, span, n)


def _answer_metric(scores: AnswerScores) -> str:
    """avg@n, and what sets this score apart from one of all samples that counts truncated answers as usual."""
    caveats = []
    if scores.partial:
        caveats.append(f"{scores.missing:,} samples missing")
    if scores.truncated_as == "graded" and BENCHMARKS[scores.benchmark].truncated_is_incorrect:
        caveats.append("truncated answers graded")
    return f"avg@{scores.samples}" + (f" ({', '.join(caveats)})" if caveats else "")
