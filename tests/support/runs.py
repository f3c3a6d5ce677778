"""A command, or its work in a run folder, in this process."""

import signal
import sys
from contextlib import closing
from io import StringIO
from pathlib import Path

from rich.console import Console

from lt_train import cli
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run import run_command
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.schema import Recipe
from lt_train.runtime.processes import Process


def run_in_folder(recipe: Recipe, runs: Path, command: str = "run", *, only: bool = False) -> str:
    """Do what `lt-train COMMAND` would; returns what was printed."""
    console, folder = Console(record=True, width=200, file=StringIO()), RunFolder(recipe, runs)
    context = RunContext(recipe, folder, console, Process(0, 1, launched=False))
    with folder.begin(), closing(context):
        run_command(context, command, only=only)
    return console.export_text()


def call_lt_train(command: list[str]) -> None:
    """`lt-train` and these arguments, for a process of its own: it ends this one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.argv = ["lt-train", *command]
    cli.main()
