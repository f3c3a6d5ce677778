"""A run from its beginning to any of its stages.

A stage is a module: what it needs, whether it is done, what it does, and what it leaves in the run folder. What one stage hands to
the next are files there, so a run resumes at the first stage that is not done.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from rich.console import Console

from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.stages import convert, evaluate, export, profile, sample, teach, train
from lt_train.pipeline.time_left import time_left
from lt_train.recipe.schema import Recipe
from lt_train.report.results import show_results
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process, check_environment, wait_until


class Stage(Protocol):
    NAME: str
    """Of its folder and of its marker in the run folder."""
    NEEDS: tuple[str, ...]
    """The stages whose results it reads."""

    def is_wanted(self, context: RunContext) -> bool:
        """Whether the recipe includes it."""

    def is_done(self, context: RunContext) -> bool: ...

    def describe(self, context: RunContext) -> str:
        """Its work with the recipe's sizes, in a few words."""

    def check(self, context: RunContext) -> None:
        """Raise a UserError for what would stop it, before the stages in front of it take their time."""

    def run(self, context: RunContext) -> None: ...


STAGES: tuple[Stage, ...] = (profile, convert, teach, train, evaluate, export)
"""In the order in which a run goes through them."""

COMMANDS = MappingProxyType(
    {"profile": profile, "convert": convert, "teacher": teach, "train": train, "eval": evaluate, "export": export}
)
"""Command -> the stage up to which it runs."""

FOLLOWERS = MappingProxyType({"train": train, "eval": evaluate})
"""Commands that several processes share: all ranks but the first `follow` the stage."""


def work(recipe: Recipe, command: str, runs: Path, process: Process, *, only: bool = False) -> Path:
    """Do a command's work in the run folder of a recipe, and return that folder; ranks other than the first follow.

    Raises:
        UserError: see `check_environment`, `RunFolder.begin`, `RunFolder.join` and `run_command`.
    """
    check_environment(process)
    folder = RunFolder(recipe, runs)
    context = RunContext(recipe, folder, Console(), process)
    if process.is_main:
        with folder.begin(), closing(context):
            if process.count > 1:
                folder.announce()
            run_command(context, command, only=only)
    else:
        folder.join()
        follow_command(context, command)
    return folder.paths.root


def run_command(context: RunContext, command: str, *, only: bool = False) -> None:
    """Do the work of `lt-train run`, `sample` or a stage's command, in the process that works in the run folder.

    Args:
        only: refuse where an earlier stage is not done, instead of doing it first.

    Raises:
        UserError: a stage cannot be done, or `only` and an earlier stage is not done.
    """
    if command == "run":
        run_up_to(export, context)
        show_results(context.paths.root, context.console)
    elif command == "sample":
        needed = sample.needs(sample.settings(context))
        for stage in STAGES:
            if needed == stage.NAME:
                run_up_to(stage, context)
        sample.run(context)
    else:
        run_up_to(COMMANDS[command], context, announce=command, only=only)


def run_up_to(wanted: Stage, context: RunContext, *, announce: str | None = None, only: bool = False) -> None:
    """Do `wanted`, and before it what it needs and what is not done yet.

    Args:
        announce: the command to name in the line that lists the earlier stages; None: print none.
    """
    if not wanted.is_wanted(context) and wanted is teach:
        raise UserError(
            "train.distill: this training reads no teacher from disk. Fix: set train.distill.teacher to top_k and "
            "train.distill.weight above 0"
        )
    if not wanted.is_wanted(context) and wanted is export and announce is not None:
        raise UserError(
            "hybrid.select: per_prompt: a checkpoint names the layers that stream, and here each prompt chooses them in the "
            "built-in engine. Fix: set hybrid.select to static, or measure without export, with lt-train eval"
        )
    stages = [stage for stage in up_to(wanted) if stage.is_wanted(context)]
    pending = [stage for stage in stages if not stage.is_done(context)]
    earlier = [stage for stage in pending if stage is not wanted]
    if earlier and announce is not None:
        listed = ", ".join(stage.describe(context) for stage in earlier)
        if only:
            raise UserError(f"{announce} --only: not done yet: {listed}. Fix: leave --only out, or run these stages first")
        context.report(announce, f"first: {listed}")
    for stage in pending:
        stage.check(context)
    for number, stage in enumerate(stages, start=1):
        if not stage.is_done(context):  # checked again: new scores make a finished export one of earlier scores
            if len(stages) > 1:
                _announce(stage, number, stages, context)
            stage.run(context)


def _announce(stage: Stage, number: int, stages: Sequence[Stage], context: RunContext) -> None:
    names = [each.NAME for each in stages]
    left = time_left(context, names[: number - 1], names[number - 1 :])
    context.report("run", "; ".join(filter(None, [f"stage {number} of {len(stages)}: {stage.describe(context)}", left])))


def follow_command(context: RunContext, command: str) -> None:
    """The work of ranks other than the first: wait for the earlier stages, then share the work of the last, without printing."""
    wanted = FOLLOWERS[command]
    for stage in up_to(wanted):
        if stage is not wanted and stage.is_wanted(context):
            wait_until(partial(stage.is_done, context))
    if wanted.is_wanted(context):
        wanted.follow(context)


def up_to(wanted: Stage) -> list[Stage]:
    """`wanted` and all that it needs, directly or through others, in the order of a run."""
    needed = {wanted.NAME}
    for stage in reversed(STAGES):
        if stage.NAME in needed:
            needed.update(stage.NEEDS)
    return [stage for stage in STAGES if stage.NAME in needed]
