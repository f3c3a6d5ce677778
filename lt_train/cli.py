"""The commands of `lt-train`, and how one ends: exit codes, messages, tracebacks.

The commands are in `commands/`; heavy libraries are imported inside them, so that --help and validate answer at once.
"""

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lt_train import __version__
from lt_train.bench.commands import bench
from lt_train.commands.machine import doctor, env
from lt_train.commands.recipes import import_layers, init, plan, recipes, schema, validate
from lt_train.commands.results import report, show
from lt_train.commands.runs import compare, convert, evaluate, export, probe, profile, run, sample, teacher, train
from lt_train.commands.serving import chat, serve
from lt_train.hybrid.spec import HybridError
from lt_train.runtime.errors import UserError, more, shortened
from lt_train.runtime.interruption import Interrupted, raising_interrupted
from lt_train.runtime.processes import Process, is_lost_connection, is_taken_port, leave, this_process, wait_for_the_launcher

app = typer.Typer(
    name="lt-train",
    help="Turn a full-attention reasoning model into a hybrid: find its lazy layers, stream them, fine-tune, measure, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "A recipe": (init, recipes, validate, plan, schema, import_layers),
    "A run": (run, profile, convert, teacher, train, evaluate, export, sample, compare),
    "Results": (show, report),
    "A hybrid": (chat, serve),
    "This machine": (env, doctor),
}
"""Heading of `lt-train --help` -> the commands below it."""

for heading, commands in COMMANDS.items():
    for command in commands:  # each bears its function's name, save one that a function of Python should not bear
        app.command("eval" if command is evaluate else None, rich_help_panel=heading)(command)
app.command(hidden=True)(probe)
app.add_typer(bench, name="bench", rich_help_panel="This machine")

NO_ACCESS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.EIO, errno.ESTALE),
)
"""What the operating system reports of a place that this user may not use, or that holds a file where a folder should be."""


def _version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    # DeepSpeed's launcher puts --local_rank=N before our arguments; the rank itself comes by the environment.
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake leaves with its message and exit code 2, a bug keeps its traceback.

    Of several processes one reports it, and all end.
    """
    try:
        process = this_process()
    except UserError as error:
        sys.exit(_report(error, Process(0, 1, launched=False)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 lacks ± and ─
    try:
        with raising_interrupted():
            app()
    except SystemExit as done:  # of a command that succeeded, or was called with invalid arguments
        code = int(done.code or 0)
    except Exception as error:
        if _is_full_disk(error):
            error = UserError(f"{error}. What is finished is valid. Fix: free some space; the same command resumes")
        elif _is_out_of_memory(error):
            problem = ". ".join(str(error).split(". ")[:2])
            fix = "Fix: a smaller train.micro_batch_size, train.gradient_checkpointing, or a smaller kv_budget in eval"
            error = UserError(f"{problem}. {fix}; the same command then resumes{more('out-of-memory')}")
        elif isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename is not None:
            place = shortened(os.fsdecode(error.filename), 300)
            error = UserError(f"{place}: {error.strerror}. Fix: let this user read and write there, or move it away")
        if process.count == 1 and not _is_user_error(error):
            raise
        wait_for_the_launcher(process, error)
        code = _report(error, process)
    except Interrupted as stop:
        code = stop.exit_code
        if process.is_main:
            resumes = "; the same command resumes" if stop.resumes else ""
            Console(stderr=True).print(f"{stop}{resumes}", highlight=False, soft_wrap=True)
    if process.count > 1:
        leave(code)
    sys.exit(code)


def _report(error: Exception, process: Process) -> int:
    """Print the error; returns the exit code."""
    where = "" if process.is_main else f" in {process.name}:"
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
