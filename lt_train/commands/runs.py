"""Commands that work in a run's folder: each stage, all of them, and a comparison of several runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lt_train.commands.options import Overrides, RecipePath, RunsRoot
from lt_train.runtime.errors import UserError
from lt_train.runtime.interruption import resuming
from lt_train.runtime.processes import end_with, silence, this_process
from lt_train.runtime.upstream import quiet_upstream

Only = Annotated[bool, typer.Option("--only", help="Refuse where an earlier stage is not done, instead of doing it first.")]


def run(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Do all that a recipe sets, from base model to exported hybrid; resumes where it stopped."""
    _work("run", recipe, overrides, runs)


def profile(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Score the layers: how much does the model lose when one of them streams?"""
    _work("profile", recipe, overrides, runs)


def convert(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Choose the layers that stream and write the hybrid's config (no weights are copied)."""
    _work("convert", recipe, overrides, runs, only)


def teacher(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Write what `train.distill.teacher: top_k` learns from, before training starts; resumes where it stopped."""
    _work("teacher", recipe, overrides, runs)


def train(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Fine-tune the hybrid; the command to start with deepspeed or torchrun."""
    _work("train", recipe, overrides, runs, only)


def evaluate(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Measure base, converted and trained model by the recipe's `eval` list; several processes share the samples."""
    _work("eval", recipe, overrides, runs, only)


def export(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="As of the other commands; with --adapter a run's folder.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    runs: RunsRoot = Path("runs"),
    only: Only = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", metavar="OUT", help="Write the adapter that RUN trained, alone, to this folder.", show_default=False
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option("--verify", metavar="EXPORT", help="Compare an export's files with their hashes instead.", show_default=False),
    ] = None,
) -> None:
    """Write the hybrid as a checkpoint that others load without lt_train."""
    if (recipe is None) == (verify is None) or (verify and adapter):
        raise UserError("export: name a recipe, or RUN --adapter OUT, or --verify EXPORT. Fix: name one of them")
    if verify is not None:
        quiet_upstream()
        from lt_train.export.manifest import verify_files

        typer.echo(f"{verify}: all {len(verify_files(verify).files)} files are those that were exported, and there are no others")
    elif adapter is not None and recipe is not None:
        quiet_upstream()
        from lt_train.pipeline.adapter import export_adapter_of

        export_adapter_of(recipe, adapter)
        typer.echo(f"adapter: {adapter}")
    elif recipe is not None:
        _work("export", recipe, overrides, runs, only)


def sample(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Draw answers by the recipe's `sample` part, and write the correct ones as training data."""
    _work("sample", recipe, overrides, runs)


def _with_commas(option: str, metavar: str, help: str) -> Any:
    return typer.Option(option, metavar=metavar, help=f"{help} With commas between.", show_default=False)


@resuming()
def compare(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A recipe, or a folder of them. Its part grid has the defaults.", show_default=False),
    ],
    overrides: Overrides = None,
    strategies: Annotated[
        str | None,
        _with_commas("--strategies", "NAMES", "How layers are chosen; also per_prompt, and full: full attention, trained alike."),
    ] = None,
    ratios: Annotated[str | None, _with_commas("--ratios", "NUMBERS", "Fractions of layers that stream.")] = None,
    granularities: Annotated[str | None, _with_commas("--granularities", "NAMES", "layer, kv_head (by gates), or both.")] = None,
    trainings: Annotated[str | None, _with_commas("--trainings", "NAMES", "sft, distilled (by train.distill), or both.")] = None,
    seeds: Annotated[str | None, _with_commas("--seeds", "NUMBERS", "Repeat everything with each of these.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Train nothing, and measure on few samples, with one seed.")] = False,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Run a recipe with several choices of what streams, and write tables and a picture; finished runs are not run again."""
    lists = {"strategies": strategies, "ratios": ratios, "granularities": granularities, "trainings": trainings, "seeds": seeds}
    grid = [f"grid.{setting}=[{values}]" for setting, values in lists.items() if values is not None]
    quiet_upstream()
    from lt_train.pipeline.comparison import compare
    from lt_train.recipe.shipped import find_recipes

    for path in find_recipes(recipe):
        out = compare(path, [*(overrides or ()), *grid], quick, runs, this_process())
        typer.echo(f"comparison: {out / 'comparison.html'}")


def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    step: Annotated[int, typer.Option()],
    parent: Annotated[int, typer.Option(help="Process with which to end.")],
) -> None:
    """Evaluate a checkpoint by `train.probes`. A training starts this by itself."""
    quiet_upstream()
    from lt_train.pipeline.probing import probe_checkpoint

    end_with(parent)
    probe_checkpoint(run, step)


@resuming()
def _work(command: str, recipe: Path, overrides: list[str] | None, runs: Path, only: bool = False) -> None:
    """Run a command in the run folder of a recipe; ranks other than the first follow."""
    from lt_train.recipe.loading import load_recipe

    checked, process = load_recipe(recipe, overrides or ()), this_process()
    if process.count > 1 and command not in ("train", "eval"):
        raise UserError(
            f"lt-train {command}: runs in one process, not in {process.count}. Fix: start it without deepspeed or torchrun; "
            "only train and eval run under them"
        )
    quiet_upstream()
    if not process.is_main:
        silence()
    from lt_train.pipeline.run import work

    work(checked, command, runs, process, only=only)
