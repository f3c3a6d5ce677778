"""Commands that look at the machine at hand."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from lt_train.commands.options import AsJson, print_json
from lt_train.runtime.upstream import quiet_upstream


def env(as_json: AsJson = False) -> None:
    """Print versions, devices, free memory and which attention kernels work here: what a bug report needs."""
    quiet_upstream()
    from lt_train.bench.environment import read_environment, show_environment

    found = read_environment()
    if as_json:
        print_json(asdict(found))
    else:
        show_environment(found, Console())


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
        print_json(asdict(found))
    else:
        show_diagnosis(found, Console())
    if not found.passed:
        raise typer.Exit(1)
