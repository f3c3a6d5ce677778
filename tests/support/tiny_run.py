"""A recipe of every stage on the shipped tiny reasoner, each shrunk to seconds, and its data."""

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedConfig

from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from tests.support.repository import REPOSITORY

REASONER = REPOSITORY / "data/tiny-reasoner"

RECIPE = f"""
name: tiny
model: {{base: {REASONER}, dtype: fp32}}
hybrid: {{lazy_layer_ratio: 0.5, w_sink: 4, w_recent: 12, calibration: {{samples: 2}}}}
data: {{source: TRACES, format: still, max_length: 256, heldout: 4}}
train: {{method: lora, learning_rate: 1.0e-3, max_steps: 2, batch_size: 4, micro_batch_size: 4}}
eval:
  - {{benchmark: ledger, path: PROBLEMS, limit: 4, max_new_tokens: 8, batch_size: 4}}
  - {{benchmark: heldout_loss, batch_size: 4}}
  - {{benchmark: heldout_kl, batch_size: 4}}
"""


def write_inputs(folder: Path, problems: int = 6) -> None:
    """recipe.yaml, traces.jsonl and problems.jsonl."""
    for name, source, rows in (("traces", "train", 16), ("problems", "test", problems)):
        with open(REPOSITORY / f"data/ledger/{source}.jsonl", encoding="utf-8") as file:
            (folder / f"{name}.jsonl").write_text("".join(next(file) for _ in range(rows)), encoding="utf-8")
    write_recipe(folder)


def write_recipe(inputs: Path) -> None:
    named = RECIPE.replace("TRACES", str(inputs / "traces.jsonl")).replace("PROBLEMS", str(inputs / "problems.jsonl"))
    (inputs / "recipe.yaml").write_text(named)


def add_base(inputs: Path, config: PreTrainedConfig) -> None:
    """base/: random weights of another family, with the tokenizer of the tiny reasoner."""
    shutil.copytree(REASONER, inputs / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(inputs / "base")


def recipe_on_base(inputs: Path, *overrides: str) -> Recipe:
    return load_recipe(inputs / "recipe.yaml", (f"model.base={inputs / 'base'}", *overrides))


def every_stage(inputs: Path) -> tuple[str, ...]:
    """Overrides: scored in three ways, trained on packed rows, and measured by a loss and by answers with a draft."""
    answers = f"{{benchmark: ledger, path: {inputs / 'problems.jsonl'}, limit: 2, max_new_tokens: 8, draft: streaming}}"
    evaluations = f"eval=[{{benchmark: heldout_loss, batch_size: 4, variants: [base, converted, trained]}}, {answers}]"
    return "hybrid.strategy=reach", "hybrid.compare=[lazy_ratio, periodic]", "data.packing=true", evaluations
