"""A model whose weights exceed the memory of the process that exports it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from lt_train.export.manifest import read_manifest
from lt_train.hybrid.loading import build_hybrid, load_hybrid
from lt_train.hybrid.spec import HybridSpec
from tests.support import processes
from tests.support.repository import ENVIRONMENT

SPEC = HybridSpec(9, tuple(range(0, 9, 2)), 3, 7)
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=9,
    num_attention_heads=8,
    num_key_value_heads=8,
    pad_token_id=0,
    tie_word_embeddings=True,
)
SHARD = 80 * 10**6


def base_in(folder: Path) -> Path:
    """Random weights in bf16, a layer in a file: they are never all in memory here either."""
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        parameters = dict(build_hybrid(CONFIG, SPEC).named_parameters())
    files: dict[str, str] = {}
    for at in range(-1, SPEC.num_layers):
        names = [name for name in parameters if (f".layers.{at}." in name if at >= 0 else ".layers." not in name)]
        files |= dict.fromkeys(names, f"model-{at + 1:05}.safetensors")
        save_file(
            {name: torch.empty(parameters[name].shape).uniform_(-0.05, 0.05).bfloat16() for name in names},
            folder / f"model-{at + 1:05}.safetensors",
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def adapter_in(folder: Path, base: Path) -> Path:
    adapted = get_peft_model(load_hybrid(base, SPEC, dtype=torch.bfloat16), LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.slow
def test_a_model_larger_than_the_memory_of_the_process_is_exported_as_it_would_be_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = base_in(tmp_path / "base")
    adapter, out = adapter_in(tmp_path / "adapter", base), tmp_path / "export"
    size = 2 * sum(path.stat().st_size for path in base.glob("*.safetensors"))  # in fp32
    given = {"num_layers": SPEC.num_layers, "lazy_layers": SPEC.lazy_layers, "allowed": 2 * SHARD, "shard": SHARD}
    places = {"base": str(base), "adapter": str(adapter), "out": str(out)}
    command = [sys.executable, "-m", "tests.support.limited_export", json.dumps(given | places)]
    done = processes.run(command, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    measured = json.loads(out.with_suffix(".json").read_text())
    assert given["allowed"] < size / 3
    assert measured["peak of anonymous memory"] < 1.75 * SHARD, measured
    assert any("not compared with the model in memory: it needs" in line for line in measured["lines"])
    assert read_manifest(out).check is None and "Not compared with the model in memory" in (out / "README.md").read_text()

    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5 and all(path.stat().st_size <= SHARD + 10**5 for path in files)
    wanted = dict(PeftModel.from_pretrained(load_hybrid(base, SPEC), adapter).merge_and_unload().named_parameters())
    for path in files:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(opened.get_tensor(name), wanted.pop(name)), name
    assert not wanted
