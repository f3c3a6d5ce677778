import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MinistralConfig, Qwen2Config

from lt_train.export.configs import STOCK, exported_config, exported_generation_config, stock_config
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, SIZES, WITH_LAYER_TYPES, on_base
from tests.support.tiny_exports import tiny_hybrid, tiny_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_LAYER_TYPES)
def test_without_sinks_the_stock_class_computes_the_same(family):
    hybrid = tiny_hybrid(family, w_sink=0)
    config = exported_config(hybrid, torch.float32)
    stock = STOCK[type(hybrid.config)][1](config).eval()
    stock.load_state_dict(hybrid.state_dict())
    ids = torch.randint(2, 96, (2, 40))
    torch.testing.assert_close(stock(ids).logits, hybrid(ids).logits, atol=1e-4, rtol=1e-5)
    assert not {"w_sink", "streaming_kv_heads", "auto_map"} & config.to_dict().keys()
    assert config.architectures == [type(stock).__name__]


@pytest.mark.parametrize("family", sorted(BASES.keys() - set(WITH_LAYER_TYPES)))
def test_without_sinks_a_family_whose_stock_class_knows_no_layer_types_keeps_its_own_code(family):
    config = exported_config(tiny_hybrid(family, w_sink=0), torch.float32)
    assert config.model_type == f"lt_hybrid_{family}" and config.auto_map["AutoConfig"].startswith("families.")


@pytest.mark.parametrize("family", ["qwen2", "ministral"])
def test_no_stock_class_computes_windows_of_two_sizes(family):
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    own = {"qwen2": (Qwen2Config, {"use_sliding_window": True}), "ministral": (MinistralConfig, {"head_dim": 16})}
    config_class, settings = own[family]
    base = config_class(**SIZES, **settings, layer_types=types, sliding_window=9)
    model = build_hybrid(base, on_base(base, HybridSpec(4, (1,), w_sink=0, w_recent=7)))
    config = exported_config(model, torch.float32)
    assert config.model_type == f"lt_hybrid_{family}" and config.auto_map
    assert (config.layer_types, config.sliding_window, config.w_recent) == (types, 9, 7)


def test_no_stock_class_computes_split_layers_without_sinks_either():
    config = exported_config(tiny_hybrid(w_sink=0, split=((2, (1,)),)), torch.float32)
    assert config.model_type == "lt_hybrid_qwen3" and config.auto_map and config.streaming_kv_heads == [[], [0, 1], [1], [0, 1]]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("lazy", [(0, 1), (3,), (0, 1, 2, 3)])
def test_max_window_layers_never_claims_that_no_layer_slides(family, lazy):
    # vLLM's own Qwen2 class takes max_window_layers == num_hidden_layers for full attention everywhere, and says nothing
    config = stock_config(tiny_hybrid(family, w_sink=0, lazy=lazy).config)
    assert config.max_window_layers == lazy[0] < config.num_hidden_layers
    assert config.use_sliding_window and config.sliding_window == 7


def test_with_sinks_the_config_names_its_code_and_the_model_in_memory_stays_as_it_was():
    hybrid = tiny_hybrid("llama")
    config = exported_config(hybrid, torch.bfloat16)
    assert config.auto_map == {
        "AutoConfig": "families.HybridMinistralConfig",
        "AutoModelForCausalLM": "families.HybridMinistralForCausalLM",
        "AutoModel": "families.HybridMinistralModel",
    }
    assert config.model_type == "lt_hybrid_ministral" and config.w_sink == 3 and config.dtype == torch.bfloat16
    assert "auto_map" not in hybrid.config.to_dict()


def test_an_export_loaded_by_the_installed_classes_and_saved_names_no_code_that_is_not_beside_it(tmp_path):
    hybrid = tiny_hybrid("llama")
    hybrid.config = exported_config(hybrid, torch.float32)
    hybrid.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(hybrid)


def test_every_token_that_ends_an_answer_is_exported():
    model, tokenizer = tiny_hybrid(), tiny_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[7, 9], pad_token_id=5)
    config = exported_generation_config(model, tokenizer)
    assert config.eos_token_id == [tokenizer.eos_token_id, 7, 9]
    assert config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == [7, 9]


def test_without_a_padding_token_the_end_stands_in():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    config = exported_generation_config(tiny_hybrid(), tokenizer)
    assert config.pad_token_id == tokenizer.eos_token_id


def test_a_model_that_would_never_stop_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="never stop"):
        exported_generation_config(tiny_hybrid(), tokenizer)


@pytest.mark.parametrize("do_sample", [True, None])
def test_sampling_defaults_of_the_base_are_carried(do_sample, tmp_path):
    model = tiny_hybrid()
    model.generation_config = GenerationConfig(do_sample=do_sample, temperature=0.6, top_p=0.95, repetition_penalty=1.05)
    exported_generation_config(model, tiny_tokenizer()).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.do_sample, config.temperature, config.top_p, config.repetition_penalty) == (True, 0.6, 0.95, 1.05)
