import pytest
from transformers import Qwen3MoeConfig

from lt_train.inference.loading import load_base_config
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.runtime.errors import UserError
from tests.support.public_models import CONFIGS, public_recipe


def shape_of(model: str, **settings) -> ModelShape:
    recipe = public_recipe(model, **settings)
    return model_shape(recipe, load_base_config(recipe.model))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [  # total_size of model.safetensors.index.json over the 2 bytes of a bf16 weight, as published on the hub
        ("qwen2.5-32b-instruct", 65_527_752_704 // 2),
        ("qwen3-8b", 16_381_470_720 // 2),
        ("deepseek-r1-distill-llama-8b", 16_060_522_496 // 2),
        ("mistral-7b-instruct-v0.3", 14_496_047_104 // 2),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(model, parameters):
    assert shape_of(model).parameters == parameters


def test_full_fine_tuning_trains_all_and_lora_its_adapters():
    assert shape_of("qwen3-8b").trainable == shape_of("qwen3-8b").parameters
    adapted = shape_of("qwen3-8b", train={"method": "lora"}, lora={"rank": 8, "targets": ["q_proj", "v_proj"]})
    # rank x (in + out) of both, in the 18 of 36 layers that stream: hidden 4096, 32 and 8 heads of 128
    assert adapted.trainable == adapted.adapters == 18 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert adapted.base_parameters == shape_of("qwen3-8b").parameters


def test_lazy_projections_trains_the_projections_of_streaming_layers():
    shape = shape_of("qwen3-8b", train={"parameters": "lazy_projections"})
    assert shape.trainable == 18 * 4096 * (4096 + 1024 + 1024 + 4096)
    assert not shape.head_trained


def test_the_recipes_own_layers_are_taken():
    shape = shape_of("qwen3-8b", hybrid={"layers": [3, 5], "lazy_layer_ratio": None, "strategy": None})
    assert [index for index, layer in enumerate(shape.layers) if layer.streams] == [3, 5]


def test_a_token_uses_the_weights_of_its_experts_alone(tmp_path):
    # Qwen3-30B-A3B, by its model card: 30.5 billion parameters, 3.3 billion of them active
    config = Qwen3MoeConfig(num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    config.save_pretrained(tmp_path)
    recipe = public_recipe("qwen3-8b", model={"base": str(tmp_path), "dtype": "bf16"})
    shape = model_shape(recipe, load_base_config(recipe.model))
    assert round(shape.parameters / 1e9, 1) == 30.5
    assert (shape.parameters - shape.layer_linears + shape.used_linears) / 1e9 == pytest.approx(3.3, abs=0.1)


def test_targets_that_no_layer_has_are_an_error():
    with pytest.raises(UserError, match=r"lora\.targets: c_attn"):
        shape_of("qwen3-8b", train={"method": "lora"}, lora={"targets": ["c_attn"]})


def test_every_config_says_where_it_is_from():
    for folder in CONFIGS.iterdir():
        assert (folder / "config.json").is_file()
        assert "https://huggingface.co/" in (folder / "source.txt").read_text()
