"""Hybrids with learned sinks as checkpoints of GraniteSWA: transformers' class, and the engine, compute the same from them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteSWAForCausalLM, LlamaConfig

from lt_train.export.checkpoint import export_hybrid
from lt_train.export.configs import exported_config, needs_own_code
from lt_train.export.granite_swa import NO_SINK, GraniteSWAWeights
from lt_train.export.weights import in_memory
from lt_train.hybrid.loading import hybrid_config
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from lt_train.serving.checkpoint import load_checkpoint
from tests.support.families import BASES, SIZES, SPLIT
from tests.support.tiny_exports import (
    exports_are_not_checked,
    metadata,
    tiny_hybrid,
    tiny_hybrid_with_learned_sinks,
    tiny_tokenizer,
)

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OF_GRANITE = {family: BASES[family] for family in ("qwen2", "llama", "mistral", "seed_oss", "granite")} | {
    "scaled rotary embedding": LlamaConfig(**SIZES, rope_parameters=LLAMA_3),
    "heads of another size": LlamaConfig(**SIZES, head_dim=16),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
}
IDS = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def written(model: HybridForCausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with exports_are_not_checked():
        return export_hybrid(in_memory(model), tiny_tokenizer(), folder, metadata(), dtype=dtype)


@pytest.mark.parametrize("base", OF_GRANITE)
def test_the_stock_class_and_the_engines_class_compute_what_the_hybrid_computes(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_hybrid_with_learned_sinks(OF_GRANITE[base])
    folder = written(model, tmp_path / "export")
    assert not list(folder.glob("*.py"))
    stock, info = GraniteSWAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    expected = logits(model)
    tolerance = dict(atol=1e-5 * expected.abs().max().item(), rtol=0)
    torch.testing.assert_close(logits(stock), expected, **tolerance)
    loaded = load_checkpoint(folder).model
    assert loaded.spec == model.spec
    torch.testing.assert_close(logits(loaded), expected, **tolerance)
    for parameter in model.parameters():
        if parameter.shape == (4,):
            parameter.data.zero_()
    assert (logits(model) - expected).abs().max() > 1e-2, "sinks decide"


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3", HybridSpec(4, (1, 3), 0, 7, learned_sinks=True)),
        ("smollm3", HybridSpec(4, (1, 3), 0, 7, learned_sinks=True)),
        ("phi3", HybridSpec(4, (1, 3), 0, 7, learned_sinks=True)),
        ("llama", HybridSpec(4, (1, 3), 3, 7)),
        ("llama", SPLIT),
    ],
)
def test_other_layers_and_other_sinks_keep_their_own_code(family: str, spec: HybridSpec) -> None:
    assert needs_own_code(hybrid_config(BASES[family], spec))


def test_without_sinks_a_llama_stays_a_ministral() -> None:
    assert exported_config(tiny_hybrid("llama", w_sink=0), torch.float32).model_type == "ministral"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_full_layer_takes_nothing_from_its_keys_in_any_dtype(dtype: torch.dtype) -> None:
    weights = GraniteSWAWeights(in_memory(tiny_hybrid_with_learned_sinks(BASES["qwen2"])))
    sinks_H = weights.weight("model.layers.0.self_attn.sinks", dtype)
    assert sinks_H.dtype == dtype and (sinks_H == NO_SINK).all() and torch.exp(sinks_H.float() + 1000).max() == 0
    assert not weights.weight("model.layers.0.self_attn.o_proj.bias", dtype).any()


def test_a_checkpoint_with_a_sink_in_a_full_layer_is_refused(tmp_path: Path) -> None:
    folder = written(tiny_hybrid_with_learned_sinks(BASES["llama"]), tmp_path / "export")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.sinks"][1] = 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.2\.self_attn\.sinks: full layer 2 has a sink, .* Fix: export it again"):
        load_checkpoint(folder)
