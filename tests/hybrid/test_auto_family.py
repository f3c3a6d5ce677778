"""Families made by model.family: auto: one that only the tests have, some of transformers, and what is refused."""

import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    Cohere2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteSWAConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MambaConfig,
    OlmoConfig,
    Qwen3NextConfig,
    StableLmConfig,
    ViTConfig,
)

from lt_train.hybrid.loading import build_hybrid, hybrid_config, load_hybrid, load_hybrid_checkpoint, prove_auto_family
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support import processes
from tests.support.families import HELIUM, SIZES, SPLIT, on_base
from tests.support.repository import ENVIRONMENT
from tests.support.toy_family import toy_config

SPEC = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)


@pytest.mark.parametrize("config", [toy_config(), HELIUM], ids=["toy", "helium"])
@torch.no_grad()
def test_a_proved_family_loads_its_bases_and_its_saved_hybrids(config, tmp_path):
    prove_auto_family(config)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    hybrid, ids = load_hybrid(tmp_path / "base", SPEC), torch.randint(3, 96, (2, 40))
    with hybrid.full_attention():
        assert torch.equal(hybrid(ids).logits, base(ids).logits)
    assert (hybrid(ids).logits[:, 11:] - base(ids).logits[:, 11:]).abs().max() > 1e-3
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = load_hybrid_checkpoint(tmp_path / "hybrid")
    assert again.spec == SPEC and torch.equal(again(ids).logits, hybrid(ids).logits)
    assert hybrid.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 44)


def test_a_family_that_mixes_heads_streams_by_layers_alone():
    config = DiffLlamaConfig(**SIZES)
    prove_auto_family(config)
    assert build_hybrid(config, SPEC).spec == SPEC
    with pytest.raises(HybridError, match=r"model_type: 'diffllama': not proved to stream: .* Fix: let entire layers stream"):
        build_hybrid(config, SPLIT)


def test_a_base_is_proved_while_a_model_without_weights_is_built():
    prove_auto_family(toy_config())
    with torch.device("meta"):
        hybrid = build_hybrid(toy_config(max_position_embeddings=4096), SPEC)
    assert next(hybrid.parameters()).is_meta


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("no mask", r"attention_mask: model\.layers\.2\.self_attn \(ToyAttention\) got no view of what it sees"),
        ("no interface", r"model\.layers\.2\.self_attn \(ToyAttention\): token 12 sees token 2, which streaming attention hides"),
        ("shifted", r"model\.layers\.2\.self_attn \(ToyAttention\): token 12 sees token 7, which streaming attention hides"),
        ("softcap", r"softcap: model\.layers\.2\.self_attn \(ToyAttention\) has it, and no kernel of a hybrid computes it"),
        ("bias", r"position_bias: model\.layers\.2\.self_attn \(ToyAttention\) has it, and no kernel of a hybrid computes it"),
        ("kernel", "full attention differs from the base: logits by up to"),
        ("cache", "cached tokens differ from recomputation: logits by up to"),
        ("positions", "(cached tokens differ from recomputation|packed documents differ from each alone): logits by up to"),
        ("scaled logits", "layers run one by one, .* differ from forward: logits by up to"),
    ],
)
def test_a_family_with_a_fault_is_refused_and_the_message_names_what_differed(fault, found):
    with pytest.raises(HybridError, match=f"^model_type: 'toy': not proved to stream: {found}.* Fix: choose another base$"):
        prove_auto_family(toy_config(fault))


SLIDES = {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"], "sliding_window": 9}
"""The layer that has the fault slides."""


def test_a_family_that_ignores_a_window_of_its_own_in_a_layer_is_refused_and_the_layer_is_named():
    prove_auto_family(toy_config(**SLIDES))
    at = r"model\.layers\.2\.self_attn \(ToyAttention\)"
    for fault, found in (
        ("no window", "with full attention it differs from the base beyond the window"),
        ("no interface", "token 12 sees token 0, which sliding attention hides"),
    ):
        with pytest.raises(
            HybridError, match=f"^model_type: 'toy': not proved to stream: {at}: {found}.* Fix: choose another base$"
        ):
            prove_auto_family(toy_config(fault, **SLIDES))


def test_a_family_whose_layers_hand_nothing_through_is_refused():
    config = StableLmConfig(**{**SIZES, "hidden_size": 64})
    with pytest.raises(HybridError, match=r"model\.layers\.0\.self_attn \(StableLmAttention\) got no view of what it sees"):
        prove_auto_family(config)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = {
    "encoder and decoder": (BartConfig(), "bart: an encoder and cross-attention"),
    "cross-attention": (GPT2Config(add_cross_attention=True), "gpt2: an encoder and cross-attention"),
    "several parts": (Gemma3Config(), "gemma3: a model of several parts"),
    "latent attention": (DeepseekV3Config(), "self_attn of every layer: kv_lora_rank 512: latent attention"),
    "linear attention": (Qwen3NextConfig(), r"layer_types: layers 0, 1, 2, 4, …: linear_attention: only full attention"),
    "chunked attention": (Llama4TextConfig(), r"layer_types: layers 0, 1, 2, 4, …: chunked_attention: only full attention"),
    "no attention": (MambaConfig(), "mamba: no attention in it"),
    "attention of another name": (JetMoeConfig(), r"model\.layers\.0: no self_attn among .*self_attention \(JetMoeAttention\)"),
    "heads of each layer": (toy_config(num_key_value_heads=[2, 2, 1, 2]), r"num_key_value_heads: \[2, 2, 1, 2\]: layers with"),
    "other sizes in a layer": (
        toy_config("fewer heads"),
        r"model\.layers\.2\.self_attn \(ToyAttention\): other weights than in layer 0",
    ),
    "no index": (toy_config("no index"), r"model\.layers\.2\.self_attn \(ToyAttention\): its layer_idx is not 2"),
    "capped scores": (Gemma2Config(), r"attn_logit_softcapping: 50\.0: no kernel"),
    "changing frequencies": (OlmoConfig(**SIZES, rope_parameters=DYNAMIC), "rope_parameters: rope_type dynamic: its frequencies"),
    "biases of positions": (FalconConfig(alibi=True), "alibi: attention with biases of positions"),
    "learned sinks": (GraniteSWAConfig(), r"model\.layers\.0\.self_attn \(GraniteSWAAttention\): learned sinks of the base"),
    "windows in all layers": (
        Gemma3TextConfig(**SIZES, sliding_window=9),  # of six layers the last would be full, and it has four
        r"sliding_window: 9: every layer of the base \(gemma3_text\) sees this many tokens from the start",
    ),
    "both directions": (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention: True: tokens see later"),
    "one type of layers that has rotary embeddings by type": (
        Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 4),
        "layer_types: gemma3_text has rotary embeddings for each type of layer, and all layers of one type",
    ),
    "other names": (GPT2Config(), "model.embed_tokens of GPT2LMHeadModel: missing"),
    "no language model": (ViTConfig(), "model_type: 'vit': transformers has no causal language model of it"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("convert", [prove_auto_family, lambda config: hybrid_config(config, SPEC)], ids=["auto", "undeclared"])
def test_a_base_that_no_hybrid_computes_is_refused_with_the_module_or_setting_and_the_reason(kind, convert):
    config, reason = REFUSED[kind]
    with pytest.raises(HybridError, match=f"^(model_type: '.*': no hybrid class: )?{reason}.* Fix: choose "):
        convert(config)


def test_a_family_that_could_be_proved_is_refused_without_auto_and_the_message_names_the_setting():
    with pytest.raises(HybridError, match=r"model_type: 'olmo': no hybrid class\. Fix: set model\.family to auto, .* or choose"):
        hybrid_config(OlmoConfig(**SIZES), SPEC)


SLIDES_AND_FULL = {
    "gemma3_text": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        rope_parameters={"sliding_attention": {"rope_theta": 100.0}, "full_attention": {"rope_theta": 1e6}},
    ),
}


@pytest.mark.parametrize("family", SLIDES_AND_FULL)
@torch.no_grad()
def test_a_family_with_sliding_layers_is_proved_and_is_the_base_beyond_its_window(family, tmp_path):
    config = SLIDES_AND_FULL[family]
    prove_auto_family(config)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    spec = on_base(config, HybridSpec(4, (2,), w_sink=3, w_recent=7))
    hybrid, ids = load_hybrid(tmp_path / "base", spec), torch.randint(3, 96, (2, 40))
    with hybrid.full_attention():
        torch.testing.assert_close(hybrid(ids, use_cache=False).logits, base(ids).logits, atol=1e-5, rtol=1e-5)
    hybrid.save_pretrained(tmp_path / "hybrid")
    again = load_hybrid_checkpoint(tmp_path / "hybrid")
    assert again.spec == spec and torch.equal(again(ids).logits, hybrid(ids).logits)


def test_a_family_that_scales_its_logits_elsewhere_is_refused_with_sliding_layers_too():
    with pytest.raises(HybridError, match=r"model_type: 'cohere2': not proved to stream: layers run one by one, .* differ"):
        prove_auto_family(Cohere2Config(**SIZES))


@pytest.mark.slow
def test_a_new_process_loads_a_saved_hybrid_of_a_made_family(tmp_path):
    prove_auto_family(HELIUM)
    build_hybrid(HELIUM, SPEC).save_pretrained(tmp_path / "hybrid")
    code = (
        "from lt_train.hybrid.loading import load_hybrid_checkpoint\n"
        f"model = load_hybrid_checkpoint({str(tmp_path / 'hybrid')!r})\n"
        "print(type(model).__name__, model.spec.lazy_layers)"
    )
    ended = processes.run([sys.executable, "-c", code], env=ENVIRONMENT)
    assert ended.returncode == 0 and "HybridHeliumForCausalLM (1, 3)" in ended.stdout, ended.stderr
