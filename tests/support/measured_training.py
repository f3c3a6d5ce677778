"""Trains models of given sizes and measures the bytes that each took at its peak, in a process of its own.

On a GPU the peak is that of torch's allocator there. On a CPU it is the process's largest resident set during the training less
what it held before, as Linux counts both. What a first training loads and sets up by itself (libraries, threads, buffers) is there
before, because a tiny one was trained already.
"""

import ctypes
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen3Config

from lt_train.dataset.examples import Example, ExampleSet
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Recipe
from lt_train.runtime.tracking import NoTracker
from lt_train.training.trainer import train
from tests.support.peak_memory import cuda_peak_of, peak_of
from tests.support.tiny_training import tiny_tokenizer

WARM_UP = {
    "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64},
    "recipe": {"data": {"max_length": 64}},
}


def config_of(sizes: dict[str, Any]) -> PreTrainedConfig:
    return Qwen3Config(**{"head_dim": 16, "num_key_value_heads": 1, "eos_token_id": 0, "pad_token_id": 1, **sizes})


def recipe_of(settings: dict[str, Any], num_layers: int) -> Recipe:
    """Full fine-tuning of two steps; `settings` is laid over it, part by part."""
    parts: dict[str, Any] = {
        "name": "measured",
        "model": {"base": "measured", "dtype": "fp32"},
        "hybrid": {"layers": list(range(0, num_layers, 2)), "w_sink": 4, "w_recent": 60},
        "data": {"source": "made up", "format": "prompt_response", "max_length": 256},
        "train": {"method": "full", "learning_rate": 1e-4, "max_steps": 2, "batch_size": 1},
    }
    for part, values in settings.items():
        parts[part] = {**parts.get(part, {}), **values}
    return Recipe.model_validate(parts)


def train_rows(settings: dict[str, Any], folder: Path) -> None:
    """Two steps on rows that are as long as they may be."""
    config = config_of(settings["config"])
    recipe = recipe_of(settings["recipe"], config.num_hidden_layers)
    spec = HybridSpec(config.num_hidden_layers, tuple(recipe.hybrid.layers), recipe.hybrid.w_sink, recipe.hybrid.w_recent)
    drawn = random.Random(0)
    rows = [
        [drawn.randrange(2, config.vocab_size) for _ in range(recipe.data.max_length)] for _ in range(2 * recipe.train.batch_size)
    ]
    examples = [Example(str(at), f"made up:{at}", tuple(row[:8]), tuple(row[8:])) for at, row in enumerate(rows)]

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return build_hybrid(config, spec).to(dtype)

    train(recipe, load, tiny_tokenizer(), ExampleSet(examples, [], {}), spec, folder, NoTracker(), lambda line: None)


def measure(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """The work of the process: peaks.json has the bytes of each run by its name."""
    give_freed_memory_back()
    peak = cuda_peak_of if torch.cuda.is_available() else peak_of
    torch.set_num_threads(1)
    train_rows(WARM_UP, folder / "warm up")
    peaks = {name: peak(partial(train_rows, each, folder / name)) for name, each in runs.items()}
    (folder / "peaks.json").write_text(json.dumps(peaks))


def give_freed_memory_back() -> None:
    """At once, where a tensor has more than 256 KiB. The C library's own limits grow with what is freed."""
    for limit in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        assert ctypes.CDLL("libc.so.6").mallopt(limit, 2**18) == 1
