"""Trains on long samples and measures the bytes that each training took at its peak, in a process of its own."""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from lt_train.dataset.examples import Example, ExampleSet
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.tracking import NoTracker
from lt_train.training.trainer import train
from tests.support.peak_memory import peak_of
from tests.support.tiny_training import tiny_recipe, tiny_tokenizer

PACK = [4_500, 3_000, 2_000, 500, *[26] * 10]  # tokens of its documents: 10,260 in all

TRAININGS: dict[str, dict[str, Any]] = {
    "warm up": {"documents": [64], "checkpointing": True},
    "a quarter of a pack": {"documents": [length // 4 for length in PACK], "checkpointing": True},
    "a pack": {"documents": PACK, "checkpointing": True},
    "a pack, every activation kept": {"documents": PACK, "checkpointing": False},
}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}
CONFIG = Qwen3Config(**SIZES, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
SPEC = HybridSpec(num_layers=6, lazy_layers=(0, 1, 2, 3, 4), w_sink=4, w_recent=124)


def train_once(folder: Path, documents: Sequence[int], checkpointing: bool) -> None:
    """One optimizer step on a pack of the documents."""
    recipe = tiny_recipe(
        {
            "hybrid": {"layers": list(SPEC.lazy_layers), "w_sink": SPEC.w_sink, "w_recent": SPEC.w_recent},
            "data": {"max_length": sum(documents), "packing": True},
            "train": {"max_steps": 1, "batch_size": 1, "micro_batch_size": 1, "gradient_checkpointing": checkpointing},
        }
    )
    drawn = random.Random(0)
    rows = [tuple(drawn.randrange(2, CONFIG.vocab_size) for _ in range(length)) for length in documents]
    examples = [Example(str(at), f"made up:{at}", row[:5], row[5:]) for at, row in enumerate(rows)]
    train(
        recipe,
        lambda dtype: build_hybrid(CONFIG, SPEC).to(dtype),
        tiny_tokenizer(),
        ExampleSet(examples, [], {}),
        SPEC,
        folder,
        NoTracker(),
    )


def measure(folder: Path) -> None:
    """The work of the process: peaks.json has the bytes of each training by its name."""
    torch.set_num_threads(1)
    peaks = {name: peak_of(partial(train_once, folder / name, **settings)) for name, settings in TRAININGS.items()}
    (folder / "peaks.json").write_text(json.dumps(peaks))
