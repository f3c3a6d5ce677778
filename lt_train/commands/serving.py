"""Commands by which people and programs talk to a hybrid."""

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lt_train.runtime.errors import UserError, shortened
from lt_train.runtime.interruption import Interrupted
from lt_train.runtime.upstream import quiet_upstream

if TYPE_CHECKING:
    from lt_train.serving.draft_options import DraftOptions

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


def _bytes(option: str, given: str | None) -> int | None:
    """A size such as 8GiB, as recipes write it."""
    from pydantic import TypeAdapter, ValidationError

    from lt_train.recipe.part import Bytes

    try:
        return None if given is None else int(TypeAdapter(Bytes).validate_python(given))
    except ValidationError as error:
        raise UserError(f"{option}: {shortened(given or '')}: no size. Fix: write it as 8GiB") from error
