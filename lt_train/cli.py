"""The commands. Each is a few lines; heavy libraries are imported inside them, so that --help and validate answer at once."""

import errno
import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from lt_train import __version__
from lt_train.bench.commands import bench
from lt_train.hybrid.spec import HybridError
from lt_train.runtime.errors import UserError, more, shortened
from lt_train.runtime.interruption import Interrupted, raising_interrupted, resuming
from lt_train.runtime.processes import (
    Process,
    end_with,
    is_lost_connection,
    is_taken_port,
    leave,
    let_others_tell,
    silence,
    this_process,
)
from lt_train.runtime.upstream import quiet_upstream

if TYPE_CHECKING:
    from lt_train.serving.draft_options import DraftOptions

app = typer.Typer(
    name="lt-train",
    help="Turn a full-attention reasoning model into a hybrid: find its lazy layers, stream them, fine-tune, measure, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NO_ACCESS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.EIO, errno.ESTALE),
)
"""What the operating system reports of a place that this user may not use, or that holds a file where a folder should be."""

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe of `lt-train recipes`.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting (repeatable): --set hybrid.w_recent=252", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
RunsRoot = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where runs/<name> lies.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    # DeepSpeed's launcher puts --local_rank=N before our arguments; the rank itself comes by the environment.
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    pass


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe: every fault at once, nothing loaded."""
    from lt_train.recipe.loading import load_recipe_and_remarks

    checked, remarks = load_recipe_and_remarks(recipe, overrides or ())
    if as_json:
        _print_json({"recipe": checked.model_dump(mode="json"), "remarks": list(map(str, remarks))})
        return
    typer.echo("\n".join([f"{recipe}: a valid recipe for run {checked.name!r}", *(f"  {remark}" for remark in remarks)]))


@app.command()
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


@app.command()
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
    from lt_train.planning.setup import Machine
    from lt_train.planning.table import show_plan
    from lt_train.runtime.units import GIB

    made = plan_recipe(checked, Machine(gpus, int(gpu_memory * GIB), cpu, tflops, efficiency), samples, mean_tokens, runs)
    if as_json:
        _print_json(plan_as_json(made))
    else:
        show_plan(made, Console())
    if not made.works:
        raise typer.Exit(1)


Only = Annotated[bool, typer.Option("--only", help="Refuse where an earlier stage is not done, instead of doing it first.")]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Do all that a recipe says, from base model to exported hybrid; resumes where it stopped."""
    _work("run", recipe, overrides, runs)


@app.command()
def profile(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Score the layers: how much does the model lose when one of them streams?"""
    _work("profile", recipe, overrides, runs)


@app.command()
def convert(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Choose the layers that stream and write the hybrid's config (no weights are copied)."""
    _work("convert", recipe, overrides, runs, only)


@app.command()
def teacher(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Write what `train.distill.teacher: top_k` learns from, before training starts; resumes where it stopped."""
    _work("teacher", recipe, overrides, runs)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Fine-tune the hybrid; the command to start with deepspeed or torchrun."""
    _work("train", recipe, overrides, runs, only)


@app.command("eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Measure base, converted and trained model as the recipe's `eval` list says; several processes share the samples."""
    _work("eval", recipe, overrides, runs, only)


@app.command()
def sample(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs")) -> None:
    """Draw answers as the recipe's `sample` part says, and write the correct ones as training data."""
    _work("sample", recipe, overrides, runs)


@app.command()
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


Hybrid = Annotated[
    Path, typer.Argument(metavar="EXPORT|RUN", help="An export, or a run's folder: its trained hybrid.", show_default=False)
]


KVBudget = Annotated[
    str | None,
    typer.Option("--kv-budget", metavar="BYTES", help="KV cache, such as 8GiB. Default: most of what is free.", show_default=False),
]

Drafts = Annotated[
    Literal["streaming"] | None,
    typer.Option("--draft", help="Speculative decoding: the same weights with more streaming layers draft.", show_default=False),
]
DraftLayers = Annotated[
    str | None,
    typer.Option(
        "--draft-layers", metavar="LIST", help="Layers that stream in the draft: 1,5,6. Default: all.", show_default=False
    ),
]
DraftLength = Annotated[
    int | None,
    typer.Option("--draft-length", metavar="N", help="Tokens that the draft proposes in a round. Default: as many as pay."),
]


@app.command()
def chat(
    folder: Hybrid,
    fold: Annotated[bool, typer.Option("--fold", help="Hide the reasoning; /fold shows it again.")] = False,
    kv_budget: KVBudget = None,
    draft: Drafts = None,
    draft_layers: DraftLayers = None,
    draft_length: DraftLength = None,
) -> None:
    """Talk to a hybrid in the terminal; with piped input, a question a line."""
    from lt_train.serving.draft_options import DraftOptions

    budget, drafts = _bytes("--kv-budget", kv_budget), DraftOptions.of(draft, draft_layers, draft_length)
    quiet_upstream()
    from lt_train.serving.chat import chat as talk

    try:
        talk(folder, Console(), folded=fold, kv_budget=budget, draft=drafts)
    except Interrupted as stop:
        raise typer.Exit(stop.exit_code) from None


@app.command()
def serve(
    folder: Hybrid,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0: any free one.")] = 8000,
    kv_budget: KVBudget = None,
    max_waiting: Annotated[int, typer.Option(metavar="N", min=0, help="Requests that may wait; more are refused (429).")] = 256,
    draft: Drafts = None,
    draft_layers: DraftLayers = None,
    draft_length: DraftLength = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON", envvar="VLLM_PYTHON", help="Python of an environment with vLLM: serves what it can compute."
        ),
    ] = None,
    vllm_options: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of vLLM.")] = None,
) -> None:
    """Answer over HTTP as OpenAI's API does, by vLLM or by the built-in engine."""
    from lt_train.serving.address import listening
    from lt_train.serving.draft_options import DraftOptions

    budget, drafts = _bytes("--kv-budget", kv_budget), DraftOptions.of(draft, draft_layers, draft_length)
    try:
        with listening(host, port) as taken:  # first of all: an address that is in use costs no time
            if vllm is not None:
                _serve_by_vllm(folder, taken, budget, drafts, vllm, vllm_options or [])
            elif vllm_options:
                raise UserError(f"serve: {' '.join(vllm_options)}: options of vLLM, which is not used. Fix: add --vllm PYTHON")
            quiet_upstream()
            from lt_train.serving.server import serve as serve_hybrid

            serve_hybrid(folder, taken, budget, max_waiting, drafts, Console())
    except Interrupted as stop:  # how a server is meant to end
        raise typer.Exit(0 if stop.number == signal.SIGTERM else stop.exit_code) from None


def _serve_by_vllm(
    folder: Path, taken: socket.socket, budget: int | None, drafts: "DraftOptions | None", python: Path, options: list[str]
) -> None:
    """Returns where vLLM cannot serve it, after saying why."""
    from lt_train.inference.servers.vllm_environment import check_vllm_environment
    from lt_train.serving.by_vllm import become_vllm, export_in, obstacle

    export = export_in(folder)
    if reason := obstacle(export):
        Console().print(f"not by vLLM: {reason}", markup=False, highlight=False, soft_wrap=True)
        return
    assert export is not None, "no export is an obstacle"
    if drafts is not None:
        raise UserError("--draft: vLLM serves this export, and decodes in its own way. Fix: remove it, or --vllm and VLLM_PYTHON")
    check_vllm_environment(python, "--vllm")
    host, port = taken.getsockname()[:2]
    taken.close()
    become_vllm(python, export, host, port, budget, options)


@app.command(hidden=True)
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    step: Annotated[int, typer.Option()],
    parent: Annotated[int, typer.Option(help="Process with which to end.")],
) -> None:
    """Ask a checkpoint what `train.probes` says. A training starts this by itself."""
    quiet_upstream()
    from lt_train.pipeline.probing import probe_checkpoint

    end_with(parent)
    probe_checkpoint(run, step)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: runs/<name>.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a run's results as a table."""
    from lt_train.report.results import read_results, results_as_json, show_results

    if as_json:
        _print_json(results_as_json(read_results(run)))
    else:
        show_results(run, Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders: runs/<name> …", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page; a former one is replaced.")] = Path("report.html"),
) -> None:
    """Write one HTML page of runs: scores, charts, and every sample to filter and search."""
    from lt_train.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")


@app.command()
@resuming()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies",
            metavar="NAMES",
            help="How layers are chosen, with commas between; also per_prompt, and full: full attention, trained alike.",
        ),
    ] = "reach,lazy_ratio,periodic,random",
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="NUMBERS", help="Fractions of layers that stream, with commas between.")
    ] = "0.5,0.75",
    granularities: Annotated[
        str, typer.Option("--granularities", metavar="NAMES", help="layer, kv_head (by gates), or both with a comma between.")
    ] = "layer",
    quick: Annotated[bool, typer.Option("--quick", help="Train nothing, and measure on few samples.")] = False,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Run a recipe with what streams chosen in several ways, and write tables and a picture; finished runs are not run again."""
    named, kinds = (tuple(filter(None, map(str.strip, names.split(",")))) for names in (strategies, granularities))
    try:
        fractions = tuple(float(ratio) for ratio in ratios.split(","))
    except ValueError as error:
        raise UserError(f"--ratios: {shortened(ratios)}: not numbers with commas between. Fix: write 0.5,0.75") from error
    quiet_upstream()
    from lt_train.pipeline.comparison import Grid, compare

    out = compare(recipe, overrides or (), Grid(named, fractions, quick, kinds), runs, this_process())
    typer.echo(f"comparison: {out / 'comparison.html'}")


@app.command()
def recipes() -> None:
    """List the recipes that come with lt_train, each with what it does and the hardware for it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lt_train.recipe.shipped import read_header, shipped_recipes

    table = Table("recipe", "runs on", "", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for path in shipped_recipes():
        header = read_header(path)
        table.add_row(path.stem, header.hardware, header.subject)
    Console().print(table, markup=False, highlight=False)


@app.command("import-layers")
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
        typer.Option("--num-layers", min=1, help="Decoder layers of the base; SWAA settings need it.", show_default=False),
    ] = None,
    granularity: Annotated[
        Literal["layer", "kv_head"], typer.Option(help="What streams by gates: whole layers, or single KV heads.")
    ] = "layer",
) -> None:
    """Print what a published hybrid streams as the `hybrid` part of a recipe."""
    from lt_train.selection.imported import import_hybrid

    typer.echo(import_hybrid(source, num_layers, ratio, by_head=granularity == "kv_head").as_recipe())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and explain settings."""
    from lt_train.recipe.json_schema import json_schema

    _print_json(json_schema())


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions, devices, free memory and which attention kernels work here: what a bug report needs."""
    quiet_upstream()
    from lt_train.bench.environment import read_environment, show_environment

    found = read_environment()
    if as_json:
        _print_json(asdict(found))
    else:
        show_environment(found, Console())


@app.command()
def doctor(
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Of the model that decodes, as in `lt-train bench`. Default: 8b on a GPU, 135m on a CPU.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check kernels, training, generation, speed and DeepSpeed on this machine, in under 3 minutes; exit code 1 on a failure."""
    quiet_upstream()
    from lt_train.bench.doctor import diagnose, show_diagnosis

    found = diagnose(shape)
    if as_json:
        _print_json(asdict(found))
    else:
        show_diagnosis(found, Console())
    if not found.passed:
        raise typer.Exit(1)


app.add_typer(bench, name="bench")


def _bytes(option: str, given: str | None) -> int | None:
    """A size such as 8GiB, as recipes write it."""
    from pydantic import TypeAdapter, ValidationError

    from lt_train.recipe.part import Bytes

    try:
        return None if given is None else int(TypeAdapter(Bytes).validate_python(given))
    except ValidationError as error:
        raise UserError(f"{option}: {shortened(given or '')}: no size. Fix: write it as 8GiB") from error


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


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
    if not process.speaks:
        silence()
    from lt_train.pipeline.run import work

    work(checked, command, runs, process, only=only)


def main() -> None:
    """Entry point: a user's mistake leaves with its message and exit code 2, a bug keeps its traceback.

    Of several processes one reports it, and all end.
    """
    process = this_process()
    try:
        with raising_interrupted():
            app()
    except SystemExit as done:  # how a command ends that has not failed, or was called wrongly
        code = int(done.code or 0)
    except Exception as error:
        if _is_full_disk(error):
            error = UserError(f"{error}. What is finished is valid. Fix: free some space; the same command resumes")
        elif _is_out_of_memory(error):
            asked = ". ".join(str(error).split(". ")[:2])
            fix = "Fix: a smaller train.micro_batch_size, train.gradient_checkpointing, or a smaller kv_budget in eval"
            error = UserError(f"{asked}. {fix}; the same command then goes on{more('out-of-memory')}")
        elif isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename is not None:
            place = shortened(os.fsdecode(error.filename), 300)
            error = UserError(f"{place}: {error.strerror}. Fix: let this user read and write there, or move it away")
        if process.count == 1 and not _is_user_error(error):
            raise
        let_others_tell(process, error)
        code = _report(error, process)
    except Interrupted as stop:
        code = stop.exit_code
        if process.speaks:
            resumes = "; the same command resumes" if stop.resumes else ""
            Console(stderr=True).print(f"{stop}{resumes}", highlight=False, soft_wrap=True)
    if process.count > 1:
        leave(code)
    sys.exit(code)


def _report(error: Exception, process: Process) -> int:
    """Print what went wrong; returns the exit code."""
    where = "" if process.speaks else f" in {process.name}:"
    if is_lost_connection(error) and process.count > 1:
        message, code = f"another process was lost ({error}). If it was not stopped, the same command resumes", 1
    elif is_taken_port(error):
        port = os.environ.get("MASTER_PORT", "unknown")
        message, code = f"port {port}, at which the processes meet, is in use. Fix: give the launcher another by --master_port", 2
    elif _is_user_error(error):
        message, code = str(error), 2
    else:
        traceback.print_exception(error)
        return 1
    Console(stderr=True).print(f"[bold red]error[/bold red]{where} {escape(message)}", highlight=False, soft_wrap=True)
    return code


def _is_user_error(error: Exception) -> bool:
    return isinstance(error, UserError | HybridError)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it was not imported it raised nothing
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
