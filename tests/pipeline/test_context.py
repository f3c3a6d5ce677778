"""What the stages share."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from lt_train.pipeline.context import RunContext
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from tests.support.runs import run_in_folder


def test_a_line_is_printed_verbatim_though_it_holds_brackets():
    """A server's own words may: [/INST] would otherwise be read as the end of a style, and stop the run."""
    printed = io.StringIO()
    context = RunContext(recipe=None, folder=None, console=Console(file=printed), process=Process(0, 1, False))
    context.report("evaluate", "http://x: HTTP 500: [/INST] [red]")
    assert printed.getvalue() == "evaluate  http://x: HTTP 500: [/INST] [red]\n"


def test_a_run_begun_in_fp32_computes_nothing_on_a_machine_where_auto_is_bf16(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(inputs / "recipe.yaml", ["model.dtype=auto", "hybrid.calibration.samples=1"])
    with monkeypatch.context() as cpu:
        cpu.setattr("lt_train.runtime.devices.computes_in_bf16", lambda: False)
        run_in_folder(recipe, tmp_path, "profile")
    monkeypatch.setattr("lt_train.runtime.devices.computes_in_bf16", lambda: True)
    for command in ("train", "eval"):
        with pytest.raises(UserError, match="auto: it is bfloat16 on this machine and was float32 when this run was begun"):
            run_in_folder(recipe, tmp_path, command)
    assert sorted(marker.stem for marker in (tmp_path / "tiny/stages").iterdir()) == ["profile"]
    run_in_folder(recipe, tmp_path, "convert")  # multiplies nothing
