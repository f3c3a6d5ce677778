"""Commands that write, check and explain a recipe, and run none."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from lt_train.commands.options import AsJson, Overrides, RecipePath, RunsRoot, print_json
from lt_train.runtime.upstream import quiet_upstream


def recipes() -> None:
    """List the recipes that come with lt_train: what each does, its hardware, and its time (planned on GPUs, measured on CPUs)."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lt_train.recipe.shipped import read_header, shipped_recipes

    table = Table("recipe", "runs on", "time", "what it is", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for path in shipped_recipes():
        header = read_header(path)
        table.add_row(path.stem, header.hardware, header.time, header.subject)
    Console().print(table, markup=False, highlight=False)


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.", show_default=False)],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Base model: a local folder or hub id.", show_default=False)],
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="Traces to train on: a file, folder or hub id.", show_default=False)
    ],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RECIPE", help="Start from this recipe (see lt-train recipes).", show_default=False),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs to train on. Default: those here, or the CPU.", show_default=False)
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of each GPU. Default: of those here, or 80.", show_default=False)
    ] = None,
) -> None:
    """Write a commented recipe for a base and data, after a look at both, that fits the machine."""
    quiet_upstream()
    from lt_train.planning.new_recipe import write_recipe
    from lt_train.planning.setup import machine_here
    from lt_train.planning.table import verdict

    made = write_recipe(out, base, data, start, machine_here(gpus, gpu_memory))
    typer.echo("\n".join([f"recipe: {out}", *verdict(made), "next: the commands at its head"]))


def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe: every fault at once, nothing loaded."""
    from lt_train.recipe.loading import load_recipe_and_remarks

    checked, remarks = load_recipe_and_remarks(recipe, overrides or ())
    if as_json:
        print_json({"recipe": checked.model_dump(mode="json"), "remarks": list(map(str, remarks))})
        return
    typer.echo("\n".join([f"{recipe}: a valid recipe for run {checked.name!r}", *(f"  {remark}" for remark in remarks)]))


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="Processes of the training, one per GPU.")] = 8,
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="Memory of each GPU.")] = 80,
    cpu: Annotated[bool, typer.Option("--cpu", help="Processes on a CPU instead, each with this memory.")] = False,
    samples: Annotated[int | None, typer.Option(help="Rows of the data, where they are not local.", show_default=False)] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sample, prompt and answer, on average.", show_default=False)
    ] = None,
    tflops: Annotated[float, typer.Option(help="Peak of a GPU in dense bf16 products, in TFLOP/s; an H100's by default.")] = 989,
    efficiency: Annotated[float, typer.Option(help="Fraction of that peak that the training reaches; a guess.")] = 0.4,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Memory, tokens, FLOPs and hours of a training, from the base's config alone; exit code 1 where it does not fit."""
    from lt_train.recipe.loading import load_recipe

    checked = load_recipe(recipe, overrides or ())
    quiet_upstream()
    from lt_train.planning.as_json import plan_as_json
    from lt_train.planning.plan import plan_recipe
    from lt_train.planning.setup import Machine, gpu_memory_bytes
    from lt_train.planning.table import show_plan

    made = plan_recipe(checked, Machine(gpus, gpu_memory_bytes(gpu_memory), cpu, tflops, efficiency), samples, mean_tokens, runs)
    if as_json:
        print_json(plan_as_json(made))
    else:
        show_plan(made, Console())
    if not made.works:
        raise typer.Exit(1)


def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and explain settings."""
    from lt_train.recipe.json_schema import json_schema

    print_json(json_schema())


def import_layers(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint with layer_types, SWAA settings, DuoAttention's gates, or LightTransfer's code."
        ),
    ],
    ratio: Annotated[
        float | None,
        typer.Option("--lazy-layer-ratio", help="Fraction of layers or KV heads that stream, for gates.", show_default=False),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers", min=1, max=10_000, help="Decoder layers of the base; SWAA settings need it.", show_default=False
        ),
    ] = None,
    granularity: Annotated[
        Literal["layer", "kv_head"], typer.Option(help="What streams by gates: entire layers, or single KV heads.")
    ] = "layer",
) -> None:
    """Print what a published hybrid streams as the `hybrid` part of a recipe."""
    from lt_train.selection.imported import import_hybrid

    typer.echo(import_hybrid(source, num_layers, ratio, by_head=granularity == "kv_head").as_recipe())
