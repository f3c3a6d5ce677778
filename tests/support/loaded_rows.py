"""Rows written to a file and loaded as examples, by the chat template of a model family."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lt_train.dataset.examples import Example, ExampleSet
from lt_train.dataset.loading import load_examples
from lt_train.recipe.schema import Data, Prompt
from tests.support.chat_templates import family_tokenizer


def load_rows(
    folder: Path, rows: list[Any], tokenizer: str | PreTrainedTokenizerBase = "qwen2.5", prompt: Prompt | None = None, **data: Any
) -> ExampleSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_file(path, tokenizer, prompt, **data)


def load_file(
    path: Path, tokenizer: str | PreTrainedTokenizerBase = "qwen2.5", prompt: Prompt | None = None, **data: Any
) -> ExampleSet:
    """`tokenizer`: one, or the name of a family."""
    tokenizer = family_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    part = Data.model_validate({"source": str(path), "max_length": 4096, **data})
    return load_examples(part, prompt or Prompt(), tokenizer, model_max_length=4096, seed=0)


def texts(example: Example, tokenizer: str | PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer of an example."""
    tokenizer = family_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.answer_ids)
