"""Commands that read finished runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lt_train.commands.options import AsJson, print_json


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: runs/<name>.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a run's results as a table."""
    from lt_train.report.results import read_results, results_as_json, show_results

    if as_json:
        print_json(results_as_json(read_results(run)))
    else:
        show_results(run, Console())


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders: runs/<name> …", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page; a former one is replaced.")] = Path("report.html"),
) -> None:
    """Write one HTML page of runs: scores, charts, and every sample to filter and search."""
    from lt_train.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")
