"""How long the rest of a run takes: the plan's operations, at the rate that the run's finished stages reached on this machine."""

from collections.abc import Sequence
from statistics import fmean

from lt_train.pipeline.context import RunContext
from lt_train.planning.compute import training_compute
from lt_train.planning.profiling import profile_operations
from lt_train.planning.shape import ModelShape
from lt_train.planning.workload import Samples, training_work
from lt_train.runtime.units import format_duration
from lt_train.selection.quadrature import POINTS

COUNTED = ("profile", "train")
"""Stages whose operations the plan knows. Of the others evaluation alone takes long; how long its answers get is unknown."""


def time_left(context: RunContext, done: Sequence[str], pending: Sequence[str]) -> str:
    """The time left, such as "about 12 min left, evaluation aside"; "" before the first counted stage is done, and after the last.

    Args:
        done, pending: names of stages of this run.
    """
    measured, ahead = ([name for name in COUNTED if name in stages] for stages in (done, pending))
    if not measured or not ahead:
        return ""
    shape = context.model_shape
    seconds = sum(context.folder.marker(name)["seconds"] for name in measured)
    rate = sum(_operations(name, context, shape) for name in measured) / max(seconds, 1e-3)
    left = sum(_operations(name, context, shape) for name in ahead) / rate
    return f"about {format_duration(left)} left" + (", evaluation aside" if "eval" in pending else "")


def _operations(stage: str, context: RunContext, shape: ModelShape) -> float:
    recipe = context.recipe
    if stage == "profile":
        profile = context.layer_profile
        points = len(POINTS) if profile is None else fmean(sample.gate_points for sample in profile.samples)
        return profile_operations(recipe, shape, [len(example) for example in context.calibration], points)
    assert recipe.train is not None, "only a recipe with a train part is trained"
    samples = Samples([len(example) for example in context.examples.train], "as they are")
    return training_compute(shape, recipe.train, training_work(recipe, recipe.train, samples)).total
