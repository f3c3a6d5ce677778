"""The stage `export` reads weights from their files one at a time, and what it writes is the model that a run evaluates."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from lt_train.export.manifest import read_manifest
from lt_train.pipeline.context import RunContext
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.processes import Process
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder
from tests.support.tiny_run import write_inputs

pytestmark = pytest.mark.slow

FULL = ["train.method=full", "hybrid.layers=[1, 3]", "hybrid.lazy_layer_ratio=null", "eval=[]"]
LORA = ["hybrid.layers=[1, 3]", "hybrid.lazy_layer_ratio=null", "eval=[]"]
HEADS = ["hybrid.streaming_kv_heads=[[],[0],[0,1],[],[1],[],[],[]]", "hybrid.lazy_layer_ratio=null", "eval=[]"]
LEARNED = ["hybrid.sink=learned", "hybrid.w_sink=0", "hybrid.calibration.sink_steps=1"]


def exported(folder: Path, overrides: list[str]) -> tuple[Path, str, RunContext]:
    write_inputs(folder)
    recipe = load_recipe(folder / "recipe.yaml", [*overrides, "export.max_shard_size=400kB"])
    printed = run_in_folder(recipe, folder / "runs")
    context = RunContext(recipe, RunFolder(recipe, folder / "runs"), Console(), Process(1, 2, launched=False))
    return folder / "runs/tiny/export", printed, context


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("overrides", "variant"),
    [
        ([*FULL, "train.restore_query_key=true", *LEARNED], TRAINED),
        ([*LORA, "lora.layers=all", "train.restore_query_key=true", *LEARNED, "export.dtype=fp16"], TRAINED),
        ([*HEADS, "lora.layers=all", "train.restore_query_key=true"], TRAINED),
        ([*LORA, "train=null", *LEARNED, "export.dtype=bf16"], CONVERTED),
    ],
    ids=[
        "full, restored, learned sinks",
        "LoRA, restored, learned sinks, fp16",
        "LoRA, restored, split layers",
        "converted, bf16",
    ],
)
def test_the_exported_weights_are_those_of_the_model_in_memory(overrides: list[str], variant: str, tmp_path: Path) -> None:
    folder, printed, context = exported(tmp_path, overrides)
    assert "model is loaded into memory" not in printed
    assert read_manifest(folder).check is not None
    found, model = tensors(folder), context.variants.load(variant, torch.float32)
    assert found.keys() == dict(model.named_parameters()).keys() and len(list(folder.glob("*.safetensors"))) > 2
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(found[name].dtype)), name


def test_a_base_in_another_format_is_exported_from_memory(tmp_path: Path) -> None:
    base = Path(shutil.copytree(REPOSITORY / "data/tiny-reasoner", tmp_path / "base"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    folder, printed, _ = exported(tmp_path, [*LORA, "train=null", f"model.base={base}"])
    assert f"model is loaded into memory: {base} has no safetensors files" in printed.replace("\n", "")
    assert not list(folder.glob("*.bin")) and read_manifest(folder).check is not None
