"""Fine-tune the hybrid, where the recipe has a `train` part. Leaves checkpoints, the log, and the trained weights."""

import os
import sys
from collections.abc import Callable

from lt_train.inference.loading import load_weights
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.keys import training_notes
from lt_train.recipe.evaluations import TRAINED
from lt_train.recipe.schema import Train
from lt_train.runtime.tracking import NoTracker, Tracker
from lt_train.training.best import is_published
from lt_train.training.launch import check_launch
from lt_train.training.log import track_log
from lt_train.training.probes.results import track_probes

NAME = "train"
NEEDS: tuple[str, ...] = ("hybrid", "teacher")


def is_wanted(context: RunContext) -> bool:
    return context.recipe.train is not None


def is_done(context: RunContext) -> bool:
    """Whether the training is finished and the trained weights are those that `train.final_weights` names."""
    return context.folder.is_done(NAME) and is_published(context.paths.trained, _settings(context))


def describe(context: RunContext) -> str:
    train = _settings(context)
    length = f"{train.max_steps:,} steps" if train.max_steps else f"{train.epochs:g} epochs"
    batch = f"{train.batch_size:,} samples" if train.batch_size else f"{train.batch_tokens:,} tokens"
    return f"train ({train.method}, {length}, {batch} a step)"


def check(context: RunContext) -> None:
    train = _settings(context)
    check_launch(context.recipe, train, context.process)
    context.check_attention()
    for eval_config in train.probes.evals if train.probes else ():
        context.evaluations.plan(eval_config)


def run(context: RunContext) -> None:
    counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in context.examples.counts.items())
    context.report(NAME, f"samples: {counts}")
    if context.layer_profile is not None:
        context.tracker.image("layer profile", context.paths.profile_picture)
    track_log(context.tracker, context.paths.training_log)
    track_probes(context.tracker, context.paths.train)
    with context.folder.doing(NAME, settings=training_notes(_settings(context)), samples=context.examples.counts):
        _train(context, context.tracker, lambda line: context.report(NAME, line))
        context.finish_tracking()


def follow(context: RunContext) -> None:
    if not is_done(context):
        check_launch(context.recipe, _settings(context), context.process)
        context.check_attention()
        _train(context, NoTracker(), lambda line: None)


def _train(context: RunContext, tracker: Tracker, report: Callable[[str], None]) -> None:
    from lt_train.training.trainer import train  # loads TRL, which a finished training and other stages do without

    spec = context.variants.spec(TRAINED)
    train(
        context.recipe,
        lambda dtype: load_weights(context.recipe.model, spec, dtype, sinks=context.variants.sinks(TRAINED)),
        context.tokenizer,
        context.examples,
        spec,
        context.paths.train,
        tracker,
        report,
        teacher=context.paths.teacher,
        probe_command=lambda step: _probe_command(context, step),
    )


def _probe_command(context: RunContext, step: int) -> list[str]:
    run = [str(context.paths.root), "--step", str(step), "--parent", str(os.getpid())]
    return [sys.executable, "-m", "lt_train", "probe", *run]


def _settings(context: RunContext) -> Train:
    assert context.recipe.train is not None, "only a recipe with a train part is trained"
    return context.recipe.train
