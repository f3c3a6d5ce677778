import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
)

from lt_train.hybrid.loading import build_hybrid, hybrid_config, load_hybrid, load_hybrid_checkpoint
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.families import on_base

SPEC = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)


@pytest.fixture
def base_folder(base_config, tmp_path):
    AutoModelForCausalLM.from_config(base_config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_base_shards_load_straight_into_the_hybrid_class(base_folder, base_config):
    stock = AutoModelForCausalLM.from_pretrained(base_folder)
    spec = on_base(base_config, SPEC)
    hybrid = load_hybrid(base_folder, spec)
    assert {name: tuple(x.shape) for name, x in hybrid.state_dict().items()} == {
        name: tuple(x.shape) for name, x in stock.state_dict().items()
    }
    assert all(torch.equal(hybrid.state_dict()[name], x) for name, x in stock.state_dict().items())
    assert hybrid.spec == spec


@torch.no_grad()
def test_a_saved_hybrid_comes_back_with_its_layers_and_logits(base_folder, base_config, tmp_path):
    hybrid = load_hybrid(base_folder, spec := on_base(base_config, SPEC))
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = load_hybrid_checkpoint(tmp_path / "hybrid")
    ids = torch.randint(2, 96, (1, 30))
    assert again.spec == spec
    assert torch.equal(again(ids).logits, hybrid(ids).logits)
    assert json.loads((tmp_path / "hybrid/config.json").read_text())["w_sink"] == 3


@torch.no_grad()
def test_a_model_cast_in_memory_is_the_model_loaded_in_that_dtype(base_folder, base_config):
    spec = on_base(base_config, SPEC)
    loaded = load_hybrid(base_folder, spec, dtype=torch.bfloat16)
    cast = load_hybrid(base_folder, spec).to(torch.bfloat16)
    ids = torch.randint(2, 96, (1, 20))
    assert torch.equal(cast(ids).logits, loaded(ids).logits)
    far = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.tensor([[2000]])  # where rounded frequencies would differ
    pairs = zip(cast.model.position_embeddings(*far), loaded.model.position_embeddings(*far), strict=True)
    assert all(torch.equal(x, y) for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))


def test_rope_scaling_of_a_llama_is_kept():
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        rope_parameters=scaling,
    )
    stock, hybrid = AutoModelForCausalLM.from_config(base), build_hybrid(base, HybridSpec(2, ()))
    torch.testing.assert_close(hybrid.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq, atol=0, rtol=0)


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (OlmoConfig(), "no hybrid class"),
        (MistralConfig(), "sliding_window: 4096: every layer of the base"),
        (MinistralConfig(), "sliding_window: 4096: every layer of the base"),
        (MinistralConfig(layer_types=["full_attention", "sliding_attention"] * 16), r"sliding_layers: \[\] with a window of 0: "),
        (Qwen2Config(use_sliding_window=True, max_window_layers=2), r"sliding_layers: \[\] with a window of 0: "),
        (
            Qwen2Config(layer_types=["full_attention", "sliding_attention"] * 16),
            "sliding_window: missing, and layer_types names 16 sliding layers",
        ),
        (LlamaConfig(attention_bias=True), "attention_bias"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (Phi3Config(sliding_window=2047), "sliding_window: 2047: every layer of the base"),
        (SmolLM3Config(use_sliding_window=True, sliding_window=64), "sliding_layers: "),
        (Phi3Config(rope_parameters=LONGROPE), "longrope"),
        (Qwen2Config(rope_parameters={**LONGROPE, "original_max_position_embeddings": 64}), "rope_type longrope"),
        (LlamaConfig(rope_parameters=DYNAMIC), "rope_type dynamic: its frequencies change .* take the scaling out in a copy"),
        (Qwen2Config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantized \(gptq\)\. Fix: start from its bf16"),
        (GptOssConfig(quantization_config={"quant_method": "mxfp4"}), r"quantized \(mxfp4\).*Mxfp4Config\(dequantize=True\)"),
    ],
)
def test_bases_that_the_hybrid_classes_cannot_compute_are_refused(base, reason):
    layers = base.num_hidden_layers
    with pytest.raises(HybridError, match=reason):
        hybrid_config(base, HybridSpec(layers, (0,)))


def test_a_spec_for_another_number_of_layers_is_refused(qwen3_config):
    with pytest.raises(HybridError, match="num_layers: 5"):
        hybrid_config(qwen3_config, HybridSpec(5, (0,)))


@pytest.mark.parametrize(
    ("layers", "sizes"), [((4,), {}), ((-1,), {}), ((1, 1), {}), ((1,), {"w_sink": -1}), ((1,), {"w_recent": 0})]
)
def test_specs_out_of_range_are_refused(layers, sizes):
    with pytest.raises(HybridError):
        HybridSpec(4, layers, **sizes)


def test_a_base_with_missing_weights_is_refused(qwen3_config, tmp_path):
    AutoModelForCausalLM.from_config(qwen3_config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HybridError, match=r"missing keys: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_hybrid(tmp_path, SPEC)


def test_a_base_whose_config_ties_weights_that_differ_is_refused(qwen3_config, tmp_path):
    """transformers leaves them apart and warns; an export would be another model in vLLM, which ties them."""
    config = copy.deepcopy(qwen3_config)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_hybrid(tmp_path, SPEC)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    with pytest.raises(HybridError, match=r"tie_word_embeddings: .* an lm_head that differs .* set tie_word_embeddings to false"):
        load_hybrid(tmp_path, SPEC)


def test_a_base_with_an_adapter_beside_it_is_refused(qwen3_config, tmp_path):
    """transformers would add the adapter to the model in memory, and an export from the files would lack it."""
    base = AutoModelForCausalLM.from_config(qwen3_config)
    base.save_pretrained(tmp_path)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(HybridError, match=r"an adapter \(adapter_config\.json\), which transformers adds"):
        load_hybrid(tmp_path, SPEC)


def test_a_base_is_no_hybrid_checkpoint(qwen3_config, tmp_path):
    AutoModelForCausalLM.from_config(qwen3_config).save_pretrained(tmp_path)
    with pytest.raises(HybridError, match="not a hybrid"):
        load_hybrid_checkpoint(tmp_path)
