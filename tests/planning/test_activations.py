"""The bytes that the plan counts for a layer, against those that autograd keeps of a real one."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.planning.activations import layer_bytes
from lt_train.planning.setup import Machine, Sharding, setup_of
from lt_train.planning.shape import model_shape
from lt_train.recipe.schema import Recipe
from lt_train.training.trainable import lora_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
FAMILIES = {"qwen3": Qwen3Config(**SIZES), "llama": LlamaConfig(**SIZES)}
OTHER_FAMILIES = {
    "smollm3": SmolLM3Config(**SIZES, pad_token_id=0),
    "olmo2": Olmo2Config(**SIZES, pad_token_id=0),
    "seed_oss": SeedOssConfig(**SIZES, attention_dropout=0.0, residual_dropout=0.0),
    "granite": GraniteConfig(**SIZES),
    "glm4": Glm4Config(**SIZES, pad_token_id=0),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gpt_oss": GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3, sliding_window=None
    ),
}
OTHER_TOLERANCE = 0.02
"""Rotary embeddings, of less than a head's size or in fp32, are counted as those of Qwen3."""
LENGTH = 640
STREAMING_TOLERANCE = 0.05
"""The plan counts q, k, v, out and log-sum-exp, as flash attention keeps them; attention: blocked keeps q, k and v alone."""


def recipe_for(method: str, lazy: list[int], dtype: str, targets: list[str] | None, packing: bool) -> Recipe:
    parts = {
        "name": "tiny",
        "model": {"base": "tiny", "dtype": dtype},
        "hybrid": {"layers": lazy, "w_sink": 4, "w_recent": 60},
        "data": {"source": "made/up", "format": "still", "max_length": LENGTH, "packing": packing},
        "train": {"method": method, "learning_rate": 1e-5, "max_steps": 1, "batch_size": 1},
    }
    return Recipe.model_validate(parts | ({"lora": {"rank": 4, "targets": targets, "layers": "all"}} if targets else {}))


def kept_by_two_layers(recipe: Recipe, config, autocast: bool, weights: torch.dtype, spec: HybridSpec | None = None) -> float:
    """Bytes a token that autograd keeps of the second and third layer, each storage once."""
    spec = spec or HybridSpec(3, tuple(recipe.hybrid.layers), 4, 60)
    model = build_hybrid(config, spec).to(weights).train()
    if recipe.lora is not None:
        model = get_peft_model(model, lora_config(recipe.lora, spec, model), autocast_adapter_dtype=autocast).get_base_model()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_bf16_weight = tensor.dim() == 2 and autocast and not {LENGTH, 2 * LENGTH} & set(tensor.shape)  # two experts for a token
        if counting and tensor.is_floating_point() and storage.data_ptr() not in own and not is_bf16_weight:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its storage's address would be given to another
        return tensor

    position_ids = torch.cat([torch.arange(LENGTH // 2)] * 2)[None] if recipe.data.packing else None
    counting = False

    def begin(*_) -> None:
        nonlocal counting
        counting = True

    def end(*_) -> None:
        nonlocal counting
        counting = False

    model.model.layers[1].register_forward_pre_hook(begin)
    model.model.layers[2].register_forward_hook(end)
    casts = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), casts:
        model(input_ids=torch.randint(64, (1, LENGTH)), position_ids=position_ids, use_cache=False)
    rotary = 2 * SIZES["head_dim"] * model.model.embed_tokens.weight.element_size()  # cosines and sines, once for all layers
    return sum(kept.values()) / LENGTH - rotary


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("case", "method", "dtype", "sharding", "targets"),
    [
        ("full fp32", "full", "fp32", None, None),
        ("full bf16 under DeepSpeed", "full", "bf16", 3, None),
        ("full bf16 under autocast", "full", "bf16", None, None),
        ("LoRA on attention, fp32", "lora", "fp32", None, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("LoRA on all, bf16 under DeepSpeed", "lora", "bf16", 3, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
        ("LoRA on attention, bf16 under autocast", "lora", "bf16", None, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_a_layer_keeps_what_the_plan_counts(family, case, method, dtype, sharding, targets):
    for lazy, packing, tolerance in (([0], False, 0.001), ([0, 1], False, STREAMING_TOLERANCE), ([0], True, 0.001)):
        recipe = recipe_for(method, lazy, dtype, targets, packing)
        shape = model_shape(recipe, FAMILIES[family])
        element = replace(setup_of(recipe, recipe.train, Machine(1, 2**34), len(lazy)), sharding=Sharding(sharding)).element
        counted = sum(
            layer_bytes(shape, layer, element, gathered=packing, dense=False, length=LENGTH) for layer in shape.layers[1:]
        )
        weights = torch.bfloat16 if element.weight == 2 else torch.float32
        kept = kept_by_two_layers(recipe, FAMILIES[family], element.autocast, weights)
        assert counted == pytest.approx(kept, rel=tolerance), f"{case}, lazy {lazy}, packing {packing}"


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@pytest.mark.parametrize(("method", "dtype"), [("full", "fp32"), ("full", "bf16"), ("lora", "fp32"), ("lora", "bf16")])
@pytest.mark.parametrize("packing", [False, True])
def test_a_layer_of_every_family_keeps_what_the_plan_counts(family, method, dtype, packing):
    targets = [["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj"]][family == "phi3"] if method == "lora" else None
    recipe = recipe_for(method, [0], dtype, targets, packing)
    shape = model_shape(recipe, OTHER_FAMILIES[family])
    element = setup_of(recipe, recipe.train, Machine(1, 2**34), 1).element
    counted = sum(layer_bytes(shape, layer, element, gathered=packing, dense=False, length=LENGTH) for layer in shape.layers[1:])
    weights = torch.bfloat16 if element.weight == 2 else torch.float32
    kept = kept_by_two_layers(recipe, OTHER_FAMILIES[family], element.autocast, weights)
    assert counted == pytest.approx(kept, rel=OTHER_TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "glm4"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("method", "dtype"), [("full", "fp32"), ("full", "bf16"), ("lora", "bf16")])
def test_a_split_layer_keeps_what_the_plan_counts(family, packing, method, dtype):
    targets = [["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj"]][family == "phi3"] if method == "lora" else None
    recipe = recipe_for(method, [0], dtype, targets, packing)
    heads = {"layers": None, "granularity": "kv_head", "streaming_kv_heads": [[], [1], [0]]}
    recipe = recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update=heads)})
    config = (FAMILIES | OTHER_FAMILIES)[family]
    shape = model_shape(recipe, config)
    assert [layer.is_split for layer in shape.layers] == [False, True, True]
    element = setup_of(recipe, recipe.train, Machine(1, 2**34), 2).element
    counted = sum(layer_bytes(shape, layer, element, gathered=packing, dense=False, length=LENGTH) for layer in shape.layers[1:])
    kept = kept_by_two_layers(recipe, config, element.autocast, torch.float32, shape.spec)
    assert counted == pytest.approx(kept, rel=STREAMING_TOLERANCE)
    whole = [replace(layer, streaming=0.0) for layer in shape.layers[1:]]
    if method == "full" and not packing and family == "qwen3":  # without the copy of the output that the halves are joined in
        assert sum(layer_bytes(shape, layer, element, gathered=False, dense=False, length=LENGTH) for layer in whole) < counted


SLIDES = Olmo3Config(
    **{name: size for name, size in SIZES.items() if name != "head_dim"} | {"hidden_size": 128},
    pad_token_id=0,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    sliding_window=100,
)
"""Its head size is 32 as well."""


@pytest.mark.parametrize(("method", "dtype"), [("full", "fp32"), ("full", "bf16"), ("lora", "bf16")])
@pytest.mark.parametrize("packing", [False, True])
def test_a_layer_that_slides_in_the_base_keeps_what_the_plan_counts(method, dtype, packing):
    recipe = recipe_for(method, [0], dtype, ["q_proj", "o_proj"] if method == "lora" else None, packing)
    shape = model_shape(recipe, SLIDES)
    assert [layer.slides for layer in shape.layers] == [False, True, False]
    element = setup_of(recipe, recipe.train, Machine(1, 2**34), 1).element
    counted = sum(layer_bytes(shape, layer, element, gathered=packing, dense=False, length=LENGTH) for layer in shape.layers[1:])
    kept = kept_by_two_layers(recipe, SLIDES, element.autocast, torch.float32, shape.spec)
    assert counted == pytest.approx(kept, rel=STREAMING_TOLERANCE)


def test_attention_written_out_keeps_probabilities_and_is_counted_so():
    recipe = recipe_for("full", [0, 1], "fp32", None, False)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "reference"})})
    shape = model_shape(recipe, FAMILIES["llama"])
    setup = setup_of(recipe, recipe.train, Machine(1, 2**34), 2)
    dense, fused = (
        layer_bytes(shape, shape.layers[0], setup.element, gathered=False, dense=dense, length=LENGTH) for dense in (True, False)
    )
    assert setup.dense and dense - fused >= 4 * LENGTH * 4  # heads x keys in fp32
