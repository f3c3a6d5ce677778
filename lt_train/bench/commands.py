"""`lt-train bench …`: measurements as commands. They import heavy libraries themselves, so that --help is fast."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from lt_train.runtime.units import MIB
from lt_train.runtime.upstream import quiet_upstream

bench = typer.Typer(help="Measure speed and memory, as ratios taken in one run.", no_args_is_help=True)

BaseModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Base model: a local folder or hub id.", show_default=False)
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="Instead of a model: random weights of a published shape (135m, 0.5b, 1.5b, 8b, 32b) or of a config.json.",
        show_default=False,
    ),
]
Ratios = Annotated[
    list[float] | None,
    typer.Option("--lazy-layer-ratio", metavar="FRACTION", help="Fraction of layers that stream (repeatable). Default: 0.5, 0.75."),
]
Sinks = Annotated[int, typer.Option(help="Sink tokens.")]
Window = Annotated[int, typer.Option(help="Window in tokens.")]


@bench.command()
def decode(
    model: BaseModel = None,
    shape: Shape = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--at", metavar="TOKENS", min=1, help="Context of every sequence (repeatable). Default: 2K, 8K, 16K."),
    ] = None,
    ratios: Ratios = None,
    kv_budget: Annotated[int, typer.Option(metavar="MIB", min=1, help="KV cache of each model, in MiB.")] = 2048,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
    draft: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", min=1, help="Time speculative decoding too: tokens that a streaming draft proposes in a round."
        ),
    ] = None,
    acceptance: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fraction of the draft's tokens that is accepted. Default: measured; 0.8 with --shape."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time of a step goes, too.")] = False,
    against: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="vllm PYTHON", help="Measure vLLM on the base, too, by the python of its environment."),
    ] = None,
) -> None:
    """Tokens per second with a given KV budget: hybrids against full attention, and against what this machine can do."""
    from lt_train.bench.base import named_base
    from lt_train.bench.decode import DEFAULT_LENGTHS, DEFAULT_RATIOS, bench_decode
    from lt_train.bench.speculation import DraftRounds
    from lt_train.runtime.errors import UserError

    if against is not None and against[0] != "vllm":
        raise UserError(f"--against: {against[0]}: it is not compared with. Fix: --against vllm PYTHON")
    python = None if against is None else against[1]
    sizes = (w_sink, w_recent, lengths or DEFAULT_LENGTHS, kv_budget * MIB)
    drafts = None if draft is None else DraftRounds(draft, acceptance, w_recent)
    bench_decode(named_base(model, shape), ratios or DEFAULT_RATIOS, *sizes, Console(), drafts, profile, python)


@bench.command()
def prefill(
    model: BaseModel = None,
    shape: Shape = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--at", metavar="TOKENS", min=1, help="Length of a prompt (repeatable). Default: 4K, 16K.")
    ] = None,
    ratios: Ratios = None,
    chunk: Annotated[int, typer.Option(metavar="TOKENS", min=1, help="Tokens of one forward pass.")] = 2048,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Time until the first token of a long prompt: hybrids against full attention, and against what this machine can do."""
    from lt_train.bench.base import named_base
    from lt_train.bench.prefill import DEFAULT_LENGTHS, DEFAULT_RATIOS, bench_prefill

    sizes = (w_sink, w_recent, lengths or DEFAULT_LENGTHS, chunk)
    bench_prefill(named_base(model, shape), ratios or DEFAULT_RATIOS, *sizes, Console())


@bench.command()
def batching(
    model: BaseModel = None,
    shape: Shape = None,
    count: Annotated[int, typer.Option("--answers", help="How many answers.")] = 64,
    longest: Annotated[int, typer.Option("--longest", help="Tokens of the longest answer; the shortest has a sixteenth.")] = 1024,
    kv_budget: Annotated[int, typer.Option(metavar="MIB", min=1, help="KV cache of both, in MiB.")] = 256,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Fraction of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Answers of mixed lengths: the engine against generate() with static batches, at equal memory."""
    from lt_train.bench.base import named_base
    from lt_train.bench.batching import bench_batching

    budget = kv_budget * MIB
    bench_batching(named_base(model, shape), lazy_layer_ratio, w_sink, w_recent, count, longest, budget, Console())


@bench.command()
def growth(
    model: BaseModel = None,
    shape: Shape = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--at", metavar="TOKENS", help="Time the tokens before this length (repeatable). Default: 1K, 8K, 32K."),
    ] = None,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Fraction of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
) -> None:
    """Time per token of the hybrid and of full attention, as one sequence grows."""
    from lt_train.bench.base import named_base
    from lt_train.bench.growth import DEFAULT_LENGTHS, bench_growth

    bench_growth(named_base(model, shape), lazy_layer_ratio, w_sink, w_recent, lengths or DEFAULT_LENGTHS, Console())


@bench.command()
def attention(
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
    runs: Annotated[int, typer.Option(help="A time is the median over this many runs.")] = 9,
) -> None:
    """Streaming attention against full causal attention, forward and backward, by length and window."""
    from lt_train.bench.attention import DEFAULT_WINDOWS, bench_attention

    bench_attention(kernels or (), lengths or (), windows or DEFAULT_WINDOWS, w_sink, runs, Console())


@bench.command()
def training_step(
    model: BaseModel = None,
    shape: Shape = None,
    method: Annotated[Literal["lora", "full"], typer.Option(help="What is trained: adapters, or all weights.")] = "lora",
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the one document of a step.")] = 8192,
    lazy_layer_ratio: Annotated[float, typer.Option(help="Fraction of layers that stream.")] = 0.5,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, in both.")] = True,
    runs: Annotated[int, typer.Option(help="A time is the median over this many steps.")] = 3,
) -> None:
    """One training step of a hybrid against one of the unconverted model with stock TRL."""
    quiet_upstream()
    from lt_train.bench.base import named_base
    from lt_train.bench.training_step import bench_training_step, step_recipe

    base = named_base(model, shape)
    recipe = step_recipe(base.name, method, lazy_layer_ratio, w_sink, w_recent, tokens, checkpointing)
    bench_training_step(base, recipe, runs, Console())


@bench.command()
def lazy_ratio(
    model: BaseModel = None,
    shape: Shape = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--at", metavar="TOKENS", min=1, help="Length of the prompt (repeatable). Default: 4K.")
    ] = None,
    w_last: Annotated[int, typer.Option(help="Last queries over which the ratio is averaged.")] = 64,
    w_sink: Sinks = 4,
    w_recent: Window = 1020,
    runs: Annotated[int, typer.Option(help="A time is the median over this many passes.")] = 3,
) -> None:
    """Time that the lazy ratios of all layers, which per_prompt needs, add to a forward pass."""
    from lt_train.bench.base import named_base
    from lt_train.bench.lazy_ratio import DEFAULT_LENGTHS, bench_lazy_ratio

    bench_lazy_ratio(named_base(model, shape), lengths or DEFAULT_LENGTHS, w_last, w_sink, w_recent, runs, Console())
