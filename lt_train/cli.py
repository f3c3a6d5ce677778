"""The commands. Each is a few lines; heavy libraries are imported inside them, so that --help and validate answer at once."""

import errno
import logging
import os
import sys
import traceback
import warnings
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from lt_train import __version__
from lt_train.hybrid.spec import HybridError
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process, is_lost_connection, is_taken_port, leave, let_others_tell, silence, this_process

app = typer.Typer(
    name="lt-train",
    help="Turn a full-attention reasoning model into a hybrid: find its lazy layers, stream them, fine-tune, measure, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting (repeatable): --set hybrid.w_recent=252", show_default=False
    ),
]
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
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe: every fault at once, nothing loaded."""
    from lt_train.recipe.loading import load_recipe

    checked = load_recipe(recipe, overrides or ())
    typer.echo(f"{recipe}: a valid recipe for run {checked.name!r}")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="Processes of the training, one to a GPU.")] = 8,
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="Memory of each GPU.")] = 80,
    cpu: Annotated[bool, typer.Option("--cpu", help="Processes on a CPU instead, each with so much memory.")] = False,
    samples: Annotated[int | None, typer.Option(help="Rows of the data, where they are not at hand.", show_default=False)] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sample, prompt and answer, on average.", show_default=False)
    ] = None,
    tflops: Annotated[float, typer.Option(help="Peak of a GPU in dense bf16 products, in TFLOP/s; an H100's by default.")] = 989,
    efficiency: Annotated[float, typer.Option(help="Share of that peak which the training reaches; a guess until it runs.")] = 0.4,
) -> None:
    """Memory, tokens, FLOPs and hours of a training, from the base's config alone; exit code 1 where it does not fit."""
    from lt_train.recipe.loading import load_recipe

    checked = load_recipe(recipe, overrides or ())
    _quiet_upstream()
    from lt_train.planning.plan import make_plan
    from lt_train.planning.setup import Machine
    from lt_train.planning.table import show_plan
    from lt_train.runtime.units import GIB

    made = make_plan(checked, Machine(gpus, int(gpu_memory * GIB), cpu, tflops, efficiency), samples, mean_tokens)
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
def export(recipe: RecipePath, overrides: Overrides = None, runs: RunsRoot = Path("runs"), only: Only = False) -> None:
    """Write the hybrid as a checkpoint that others load without lt_train."""
    _work("export", recipe, overrides, runs, only)


@app.command(hidden=True)
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    step: Annotated[int, typer.Option()],
    parent: Annotated[int, typer.Option(help="Process with which to end.")],
) -> None:
    """Ask a checkpoint what `train.probes` says. A training starts this by itself."""
    _quiet_upstream()
    from lt_train.pipeline.probing import end_with, probe_checkpoint

    end_with(parent)
    probe_checkpoint(run, step)


@app.command()
def show(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: runs/<name>.", show_default=False)]) -> None:
    """Print a run's results as a table."""
    from lt_train.report.results import show_results

    show_results(run, Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders: runs/<name> …", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page; a former one is replaced.")] = Path("report.html"),
) -> None:
    """Write one HTML page of runs: scores, charts, and every sample to filter and search."""
    from lt_train.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")


bench = typer.Typer(help="Measure speed and memory, as ratios taken in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


BenchModel = Annotated[str, typer.Argument(metavar="MODEL", help="Base model: a local folder or hub id.", show_default=False)]
Sinks = Annotated[int, typer.Option(help="Sink tokens.")]
Window = Annotated[int, typer.Option(help="Window in tokens.")]


@bench.command("decode")
def bench_decode(
    model: BenchModel,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--at", metavar="TOKENS", help="Context of every sequence (repeatable). Default: 2K, 8K, 16K."),
    ] = None,
    ratios: Annotated[
        list[float] | None,
        typer.Option("--lazy-layer-ratio", metavar="SHARE", help="Share of layers that stream (repeatable). Default: 0.5, 0.75."),
    ] = None,
    kv_budget: Annotated[int, typer.Option(metavar="MIB", help="KV cache of each model, in MiB.")] = 2048,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Tokens per second that a KV budget buys: hybrids against full attention."""
    from lt_train.bench.decode import DEFAULT_LENGTHS, DEFAULT_RATIOS, bench_decode
    from lt_train.recipe.schema import Model

    budget, lengths = kv_budget * 2**20, lengths or DEFAULT_LENGTHS
    bench_decode(Model(base=model), ratios or DEFAULT_RATIOS, w_sink, w_recent, lengths, budget, Console())


@bench.command("batching")
def bench_batching(
    model: BenchModel,
    count: Annotated[int, typer.Option("--answers", help="How many answers.")] = 64,
    longest: Annotated[int, typer.Option("--longest", help="Tokens of the longest answer; the shortest has a sixteenth.")] = 1024,
    kv_budget: Annotated[int, typer.Option(metavar="MIB", help="KV cache of each way, in MiB.")] = 256,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Share of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Answers of mixed lengths: the engine against generate() with static batches, at equal memory."""
    from lt_train.bench.batching import bench_batching
    from lt_train.recipe.schema import Model

    budget = kv_budget * 2**20
    bench_batching(Model(base=model), lazy_layer_ratio, w_sink, w_recent, count, longest, budget, Console())


@bench.command("growth")
def bench_growth(
    model: BenchModel,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--at", metavar="TOKENS", help="Time the tokens before this length (repeatable). Default: 1K, 8K, 32K."),
    ] = None,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Share of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Time per token of the hybrid and of full attention, as one sequence grows."""
    from lt_train.bench.growth import DEFAULT_LENGTHS, bench_growth
    from lt_train.recipe.schema import Model

    bench_growth(Model(base=model), lazy_layer_ratio, w_sink, w_recent, lengths or DEFAULT_LENGTHS, Console())


@bench.command("attention")
def bench_attention(
    kernels: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="NAME", help="As in model.attention (repeatable). Default: all that train here."),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--at", metavar="TOKENS", help="Length (repeatable). Default: 256 to 16K, on a GPU 4K to 64K."),
    ] = None,
    windows: Annotated[
        list[int] | None, typer.Option("--w-recent", metavar="TOKENS", help="Window (repeatable). Default: 252, 1020.")
    ] = None,
    w_sink: Sinks = 4,
    runs: Annotated[int, typer.Option(help="A time is the median over so many runs.")] = 9,
) -> None:
    """Streaming attention against full causal attention, forward and backward, by length and window."""
    from lt_train.bench.attention import DEFAULT_WINDOWS, bench_attention

    bench_attention(kernels or (), lengths or (), windows or DEFAULT_WINDOWS, w_sink, runs, Console())


@bench.command("training-step")
def bench_training_step(
    model: BenchModel,
    method: Annotated[Literal["lora", "full"], typer.Option(help="What is trained: adapters, or all weights.")] = "lora",
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the one document of a step.")] = 8192,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Share of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, in both.")] = True,
    runs: Annotated[int, typer.Option(help="A time is the median over so many steps.")] = 3,
) -> None:
    """One training step of a hybrid against one of the unconverted model under stock TRL."""
    _quiet_upstream()
    from lt_train.bench.training_step import bench_training_step, step_recipe

    recipe = step_recipe(model, method, lazy_layer_ratio, w_sink, w_recent, tokens, checkpointing)
    bench_training_step(recipe, runs, Console())


def _work(command: str, recipe: Path, overrides: list[str] | None, runs: Path, only: bool = False) -> None:
    """Run a command in the run folder of a recipe; ranks other than the first follow."""
    from lt_train.recipe.loading import load_recipe

    checked, process = load_recipe(recipe, overrides or ()), this_process()
    if process.count > 1 and command not in ("train", "eval"):
        raise UserError(
            f"lt-train {command}: runs in one process, not in {process.count}. Fix: start it without deepspeed or torchrun; "
            "only train and eval run under them"
        )
    _quiet_upstream()
    if not process.speaks:
        silence()
    from lt_train.pipeline.context import RunContext
    from lt_train.pipeline.run import follow_command, run_command
    from lt_train.pipeline.run_folder import RunFolder

    folder = RunFolder(checked, runs)
    context = RunContext(checked, folder, Console(), process)
    if not process.speaks:
        follow_command(context, command)
        return
    with folder.begin(), closing(context):
        run_command(context, command, only=only)


def _quiet_upstream() -> None:
    """Keep out of a user's sight what other libraries say to their developers."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none, wherever it is imported
    # Libraries tell each other by these what will be renamed: DeepSpeed's calls of torch, peft's of transformers, and so on
    warnings.filterwarnings("ignore", category=FutureWarning)
    # accelerate compares DeepSpeed's accumulation with its own, which Trainer leaves at 1
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)


def main() -> None:
    """Entry point: a user's mistake leaves with its message and exit code 2, a bug keeps its traceback.

    Of several processes one says it, and all end.
    """
    process = this_process()
    try:
        app()
    except SystemExit as done:  # how a command ends that has not failed, or was called wrongly
        code = int(done.code or 0)
    except Exception as error:
        if _is_full_disk(error):
            error = UserError(f"{error}. What is finished is safe: make room, and the same command goes on from there")
        if process.count == 1 and not _is_users(error):
            raise
        let_others_tell(process, error)
        code = _tell(error, process)
    except KeyboardInterrupt:
        code = 130
        if process.speaks:
            Console(stderr=True).print("stopped; the same command goes on from here", highlight=False)
    (sys.exit if process.count == 1 else leave)(code)


def _tell(error: Exception, process: Process) -> int:
    """Say what went wrong; returns the exit code."""
    where = "" if process.speaks else f" in {process.name}:"
    if is_lost_connection(error) and process.count > 1:
        message, code = f"another process was lost ({error}). If it was not stopped, the same command goes on from here", 1
    elif is_taken_port(error):
        port = os.environ.get("MASTER_PORT", "unknown")
        message, code = f"port {port}, at which the processes meet, is taken. Give the launcher another by --master_port", 2
    elif _is_users(error):
        message, code = str(error), 2
    else:
        traceback.print_exception(error)
        return 1
    Console(stderr=True).print(f"[bold red]error[/bold red]{where} {escape(message)}", highlight=False, soft_wrap=True)
    return code


def _is_users(error: Exception) -> bool:
    return isinstance(error, UserError | HybridError)


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
