"""Parameters and KV cache of a published model of each family, against counts by hand from its config.json."""

import json
from dataclasses import replace

import pytest
import torch

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.families import BASES
from lt_train.hybrid.kv_size import kv_bytes
from lt_train.inference.loading import load_base_config
from lt_train.planning.shape import model_shape
from lt_train.recipe.schema import Model
from tests.support.public_models import CONFIGS, public_recipe

MODELS = {  # folder in tests/support/configs, whose source.txt is the address of the config
    "qwen2": "qwen2.5-32b-instruct",
    "qwen3": "qwen3-8b",
    "llama": "deepseek-r1-distill-llama-8b",
    "mistral": "mistral-7b-instruct-v0.3",
    "smollm3": "smollm3-3b",
    "olmo2": "olmo-2-1124-7b",
    "olmo3": "olmo-3-7b-think",
    "seed_oss": "seed-oss-36b-instruct",
    "granite": "granite-3.3-8b-instruct",
    "glm4": "glm-z1-9b-0414",
    "phi3": "phi-4-reasoning",
    "qwen3_moe": "qwen3-30b-a3b",
    "gpt_oss": "gpt-oss-20b",
}


def dense(
    vocab: int, hidden: int, layers: int, queries: int, keys: int, mlp: int, *, tied: bool, biases: int = 0, norms: int
) -> int:
    """Embedding and head; of each layer q and o, k and v, three matrices of the MLP, biases and norms; the last norm."""
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * mlp + biases + norms
    return (1 if tied else 2) * vocab * hidden + layers * layer + hidden


PARAMETERS = {
    "qwen2": dense(152064, 5120, 64, 5120, 1024, 27648, tied=False, biases=5120 + 2 * 1024, norms=2 * 5120),
    "qwen3": dense(151936, 4096, 36, 4096, 1024, 12288, tied=False, norms=2 * 4096 + 2 * 128),
    "llama": dense(128256, 4096, 32, 4096, 1024, 14336, tied=False, norms=2 * 4096),
    "mistral": dense(32768, 4096, 32, 4096, 1024, 14336, tied=False, norms=2 * 4096),
    "smollm3": dense(128256, 2048, 36, 2048, 512, 11008, tied=True, norms=2 * 2048),
    "olmo2": dense(100352, 4096, 32, 4096, 4096, 11008, tied=False, norms=2 * 4096 + 2 * 4096),
    "olmo3": dense(100278, 4096, 32, 4096, 4096, 11008, tied=False, norms=2 * 4096 + 2 * 4096),
    "seed_oss": dense(155136, 5120, 64, 10240, 1024, 27648, tied=False, biases=10240 + 2 * 1024, norms=2 * 5120),
    "granite": dense(49159, 4096, 40, 4096, 1024, 12800, tied=True, norms=2 * 4096),
    "glm4": dense(151552, 4096, 40, 4096, 256, 13696, tied=False, biases=4096 + 2 * 256, norms=4 * 4096),
    "phi3": dense(100352, 5120, 40, 5120, 1280, 17920, tied=False, norms=2 * 5120),
    # 128 experts of three matrices, and a router
    "qwen3_moe": dense(151936, 2048, 48, 4096, 512, 128 * 768, tied=False, norms=2 * 2048 + 2 * 128 + 128 * 2048),
    "gpt_oss": dense(
        *(201088, 2880, 24, 4096, 512, 32 * 2880),
        tied=False,
        biases=4096 + 2 * 512 + 2880 + 32 * 3 * 2880 + 32,  # q, k and v, o, experts, router
        norms=2 * 2880 + 64 + 32 * 2880,  # and learned sinks, and a router
    ),
}
BILLIONS = {  # as the models' own pages round them
    "qwen2": 32.8,
    "qwen3": 8.2,
    "llama": 8.0,
    "mistral": 7.2,
    "smollm3": 3.1,
    "olmo2": 7.3,
    "olmo3": 7.3,
    "seed_oss": 36.2,
    "granite": 8.2,
    "glm4": 9.4,
    "phi3": 14.7,
    "qwen3_moe": 30.5,
    "gpt_oss": 20.9,
}
KV = {  # bytes of a token in bf16: key and value of each layer, of 2 bytes each
    "qwen2": 64 * 2 * 8 * 128 * 2,
    "qwen3": 36 * 2 * 8 * 128 * 2,
    "llama": 32 * 2 * 8 * 128 * 2,
    "mistral": 32 * 2 * 8 * 128 * 2,
    "smollm3": 36 * 2 * 4 * 128 * 2,
    "olmo2": 32 * 2 * 32 * 128 * 2,
    "olmo3": 32 * 2 * 32 * 128 * 2,  # until 24 of them reach their window
    "seed_oss": 64 * 2 * 8 * 128 * 2,
    "granite": 40 * 2 * 8 * 128 * 2,
    "glm4": 40 * 2 * 2 * 128 * 2,
    "phi3": 40 * 2 * 10 * 128 * 2,
    "qwen3_moe": 48 * 2 * 4 * 128 * 2,
    "gpt_oss": 24 * 2 * 8 * 64 * 2,  # until 12 of them reach their window
}


SLIDING = {"olmo3": (24, 4096), "gpt_oss": (12, 128)}
"""Layers with a window in the base, and its tokens."""


def test_every_family_has_a_published_model_here():
    assert set(MODELS) == set(BASES) - {"ministral"}, "Llama and Mistral become ministral"
    for family, model in MODELS.items():
        assert json.loads((CONFIGS / model / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("family", MODELS)
def test_parameters_are_those_counted_by_hand(family):
    recipe = public_recipe(MODELS[family])
    assert model_shape(recipe, load_base_config(recipe.model)).parameters == PARAMETERS[family]
    assert round(PARAMETERS[family] / 1e9, 1) == BILLIONS[family]


@pytest.mark.parametrize("family", MODELS)
def test_the_kv_cache_is_that_counted_by_hand_and_streaming_layers_hold_their_window(family):
    config = load_base_config(Model(base=str(CONFIGS / MODELS[family])))
    base = base_spec(config.to_dict(), 4, 1020)
    full, layers = base.full_in_base, config.num_hidden_layers
    spec = replace(base, lazy_layers=full[: len(full) // 2])
    held = [kv_bytes(config.to_dict(), each, 32_768, torch.bfloat16.itemsize) for each in (spec.all_full, spec)]
    slide, window = SLIDING.get(family, (0, 0))
    assert len(full) == layers - slide
    tokens = [len(full) * 32_768 + slide * window, len(full) // 2 * (32_768 + 1024) + slide * window]
    assert held == [each * KV[family] // layers for each in tokens]
