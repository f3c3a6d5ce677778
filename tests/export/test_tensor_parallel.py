"""Exports over two processes by transformers' tensor parallelism: each computes what one process does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from tests.support.families import BASES, SPLIT
from tests.support.processes import call_in_ranks
from tests.support.tiny_exports import exports_are_not_checked, metadata, tiny_tokenizer

TOKENS = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)
SPECS = {"sink tokens": TOKENS, "learned sinks": replace(TOKENS, w_sink=0, learned_sinks=True), "KV heads": SPLIT}
IDS = torch.arange(3, 51).view(2, 24)


def observe(folder: Path, **settings: str) -> tuple[torch.Tensor, list[list[int]], bool]:
    """Logits, what is generated, and whether queries are sharded."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()
    with torch.no_grad():
        answers = model.generate(IDS, max_new_tokens=12, do_sample=False)
        sharded = hasattr(model.model.layers[1].self_attn.q_proj.weight, "device_mesh")
        assert hasattr(model.model.layers[1].mlp.up_proj.weight, "device_mesh") == bool(settings)
        return model(IDS, use_cache=False).logits, answers.tolist(), sharded


def observe_sharded(folders: dict[str, Path]) -> None:
    torch.distributed.init_process_group("gloo")
    for kind, folder in folders.items():
        logits, answers, sharded = observe(folder, tp_plan="auto")
        print("\n" + json.dumps([kind, logits.tolist(), answers, sharded]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_an_export_over_two_processes_computes_what_it_computes_in_one(tmp_path: Path) -> None:
    """Where learned sinks or split layers name heads each process computes all heads, and a part of each MLP."""
    folders = {}
    for kind, spec in SPECS.items():
        model = build_hybrid(BASES["qwen3"], spec).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 4)
        with exports_are_not_checked():
            folders[kind] = export_hybrid(in_memory(model), tiny_tokenizer(), tmp_path / kind, metadata(), dtype=torch.float32)
    ended = call_in_ranks(observe_sharded, folders, outputs=tmp_path / "printed")
    assert [code for code, _ in ended] == [0, 0], ended
    found = [json.loads(line) for line in ended[0][1].splitlines() if line.startswith('["')]
    assert [kind for kind, *_ in found] == list(folders)
    for kind, logits, answers, sharded in found:
        alone, alone_answers, _ = observe(folders[kind])
        torch.testing.assert_close(torch.tensor(logits), alone, atol=1e-4, rtol=0)
        assert answers == alone_answers and sharded == (kind == "sink tokens")
