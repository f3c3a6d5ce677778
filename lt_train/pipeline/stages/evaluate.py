"""Measure every variant that the recipe's evaluations name. Leaves samples and scores."""

from lt_train.evaluation.records import recorded_model
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.keys import evaluation_key
from lt_train.recipe.evaluations import BASE, TRAINED, Eval
from lt_train.recipe.schema import Recipe
from lt_train.report.results import TRACKED_COLUMNS, read_results, summary_values, tracked_rows
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import set_aside
from lt_train.runtime.fingerprints import data_fingerprint

NAME = "eval"
NEEDS: tuple[str, ...] = ("train",)


def is_wanted(context: RunContext) -> bool:
    return bool(context.recipe.eval)


def is_done(context: RunContext) -> bool:
    if not context.folder.is_done(NAME, evaluation_key(context.recipe)):
        return False
    measured = context.folder.marker(NAME).get("problems", {})  # runs of earlier versions lack it
    if any(measured.get(name, problems) != problems for name, problems in _problems(context.recipe).items()):
        return False
    return all(map(context.variants.is_measured, context.variants.to_evaluate()))


def describe(context: RunContext) -> str:
    return f"eval ({', '.join(str(each.name) for each in context.recipe.eval)})"


def check(context: RunContext) -> None:
    context.check_attention()
    context.evaluations.check()
    world_size = context.process.count
    if world_size > 1 and context.recipe.train is not None and not context.folder.is_done("train"):
        raise UserError(
            f"{context.paths.root}: not trained yet. Fix: run lt-train train first, then evaluate in {world_size} processes"
        )


def run(context: RunContext) -> None:
    _set_former_scores_aside(context)
    with context.folder.doing(NAME, evaluation_key(context.recipe), problems=_problems(context.recipe)):
        context.evaluations.measure_all()
        _track_results(context)
        context.finish_tracking()


def follow(context: RunContext) -> None:
    if not is_done(context):
        context.evaluations.measure_all()


def _problems(recipe: Recipe) -> dict[str, str]:
    """By evaluation, the fingerprint of the problems that its `path` names."""
    paths = {str(each.name): each.path for each in recipe.eval if isinstance(each, Eval)}
    return {name: data_fingerprint(path) for name, path in paths.items() if path is not None}


def _set_former_scores_aside(context: RunContext) -> None:
    """Scores of what is no longer the same model, as after a change of `train.final_weights` or `hybrid.granularity`."""
    for variant in context.variants.to_evaluate():
        folder = context.paths.stage(NAME) / variant
        if variant == BASE or not folder.is_dir():
            continue
        now = context.variants.fingerprint(variant)
        recorded = [recorded_model(evaluation) for evaluation in sorted(folder.iterdir())]
        if any(model is not None and model != now for model in recorded):
            former = set_aside(folder, context.paths.stage(f"{NAME}-{variant}"))
            what = "the trained weights" if variant == TRAINED else "what streams"
            context.report("evaluate", f"{what} changed: the previous scores are now in {former}")


def _track_results(context: RunContext) -> None:
    results = read_results(context.paths.root)
    context.tracker.summary(summary_values(results))
    for name in dict.fromkeys(result.evaluation for result in results):
        rows = tracked_rows([result for result in results if result.evaluation == name])
        context.tracker.table(f"results/{name}", TRACKED_COLUMNS, rows)
