"""Arguments and options that several commands take, and the JSON that they print."""

import json
from pathlib import Path
from typing import Annotated

import typer

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

RunsRoot = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs: one is DIR/<name>.")]


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
