from pathlib import Path

import pytest
from rich.console import Console

from lt_train.inference.loading import load_base_config
from lt_train.planning.plan import plan_recipe
from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.planning.table import show_plan
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.units import GIB
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
    assert [index for index, layer in enumerate(shape.layers) if layer.streaming] == [3, 5]


@pytest.mark.parametrize(("ratio", "layers", "split"), [(0.05, 14, 14), (0.5, 36, 36), (0.93, 36, 20)])
def test_kv_heads_that_are_yet_to_be_chosen_are_counted_in_as_many_layers_as_can_have_some(ratio, layers, split):
    shape = shape_of("qwen3-8b", hybrid={"lazy_layer_ratio": ratio, "granularity": "kv_head"}, train={"method": "lora"})
    heads = round(ratio * 36 * 8)
    assert sum(layer.streaming for layer in shape.layers) == heads / 8
    assert (len(shape.spec.streaming_layers), sum(layer.is_split for layer in shape.layers)) == (layers, split)
    assert layers == min(heads, 36) and split == min(heads, 36, 36 * 8 - heads)
    # adapters of rank 16 on q, k, v and o of every layer with some
    assert shape.trainable == layers * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))


def test_named_kv_heads_are_taken_as_they_are():
    heads = [[0, 1], *[[]] * 34, [*range(8)]]
    shape = shape_of("qwen3-8b", hybrid={"streaming_kv_heads": heads, "lazy_layer_ratio": None, "strategy": None})
    assert [layer.streaming for layer in shape.layers] == [0.25, *[0.0] * 34, 1.0]


def test_a_token_uses_the_weights_of_its_experts_alone():
    shape = shape_of("qwen3-30b-a3b")
    assert shape.parameters == 61_064_245_248 // 2  # as above: the published checkpoint
    # a layer has 128 experts of three matrices, of which a token uses 8; its model card says 3.3 billion
    assert shape.active_parameters == shape.parameters - 48 * 120 * 3 * 2048 * 768 == 3_353_032_704
    assert (shape.experts, shape.experts_of_token, shape.mlp) == (128, 8, 8 * 768)


def test_the_plan_of_the_mixtures_recipe_reports_both_counts_and_trains_adapters_of_attention_alone(capsys):
    base = f"model.base={CONFIGS / 'qwen3-30b-a3b'}"
    plan = plan_recipe(load_recipe(Path("recipes/qwen3-30b-a3b.yaml"), [base]), Machine(8, 80 * GIB), samples=5000)
    show_plan(plan, Console(width=400))
    assert "30,532,122,624 parameters, of which a token uses 3,353,032,704; 24 of 48 layers stream" in capsys.readouterr().out
    # rank 16 x (in + out) of q, k, v and o in 24 layers: hidden 2048, 32 and 4 heads of 128
    assert plan.shape.trainable == 24 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    weights = next(each.size for each in plan.training.memory.allocations if each.name == "weights")
    assert weights == -(-2 * (30_532_122_624 + plan.shape.trainable) // 8), "all experts are in memory, over 8 GPUs"
    tokens = plan.training.work.tokens
    assert 4 * tokens < plan.training.compute.linear / 3_353_032_704 < 8 * tokens, "a token's own experts are computed"


def test_targets_that_no_layer_has_are_an_error():
    with pytest.raises(UserError, match=r"lora\.targets: c_attn"):
        shape_of("qwen3-8b", train={"method": "lora"}, lora={"targets": ["c_attn"]})


def test_every_config_names_where_it_is_from():
    for folder in CONFIGS.iterdir():
        assert (folder / "config.json").is_file()
        assert "https://huggingface.co/" in (folder / "source.txt").read_text()
