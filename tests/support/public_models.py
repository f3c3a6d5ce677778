"""Configs of public models, as they stand on the hub, and recipes for them; no weights."""

from pathlib import Path
from typing import Any

from lt_train.recipe.schema import Recipe

CONFIGS = Path(__file__).parent / "configs"

HUB = {
    "Qwen/Qwen2.5-32B-Instruct": "qwen2.5-32b-instruct",
    "Qwen/QwQ-32B": "qwq-32b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "deepseek-r1-distill-llama-8b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-instruct-v0.3",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m-instruct",
}
"""Hub id -> folder in configs/."""


def public_recipe(model: str, /, **settings: Any) -> Recipe:
    """Full fine-tuning at 4,096 tokens; `settings` is laid over it, part by part."""
    parts: dict[str, Any] = {
        "name": model,
        "model": {"base": str(CONFIGS / model), "dtype": "bf16"},
        "hybrid": {"lazy_layer_ratio": 0.5},
        "data": {"source": "made/up", "format": "still", "max_length": 4096},
        "train": {"method": "full", "learning_rate": 1e-5, "epochs": 1.0, "batch_size": 16},
    }
    for part, values in settings.items():
        parts[part] = {**parts.get(part, {}), **values} if isinstance(values, dict) else values
    return Recipe.model_validate(parts)
