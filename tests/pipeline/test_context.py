"""What the stages share."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_base_config
from lt_train.pipeline.context import RunContext
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from tests.support.runs import run_in_folder
from tests.support.tiny_run import REASONER


def test_a_line_is_printed_verbatim_though_it_holds_brackets():
    """A server's own words may: [/INST] would otherwise be read as the end of a style, and stop the run."""
    printed = io.StringIO()
    context = RunContext(recipe=None, folder=None, console=Console(file=printed), process=Process(0, 1, False))
    context.report("evaluate", "http://x: HTTP 500: [/INST] [red]")
    assert printed.getvalue() == "evaluate  http://x: HTTP 500: [/INST] [red]\n"


def test_a_base_that_is_a_hybrid_is_reported_to_be_full_again_and_refused_with_learned_sinks(inputs: Path, tmp_path: Path) -> None:
    weights = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(REASONER, tmp_path / "hybrid", ignore=weights)
    load_hybrid(REASONER, HybridSpec(8, (1,), w_recent=8)).save_pretrained(tmp_path / "hybrid")
    recipe = load_recipe(inputs / "recipe.yaml", [f"model.base={tmp_path / 'hybrid'}", "hybrid.strategy=periodic"])
    printed = run_in_folder(recipe, tmp_path / "runs", "convert")
    assert "base      warning: model.base: a hybrid (lt_hybrid_qwen3); as a base all of its layers are full again" in printed
    config = json.loads((tmp_path / "hybrid/config.json").read_text())
    (tmp_path / "hybrid/config.json").write_text(json.dumps(config | {"learned_sinks": True, "w_sink": 0, "hybrid_version": "2"}))
    with pytest.raises(UserError, match=r"a hybrid \(lt_hybrid_qwen3\) with learned sinks.* Fix: name the base"):
        load_base_config(recipe.model)


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
