"""A recipe of every stage on the shipped tiny reasoner, each shrunk to seconds, and its data."""

from pathlib import Path

from tests.support.repository import REPOSITORY

RECIPE = f"""
name: tiny
model: {{base: {REPOSITORY / "data/tiny-reasoner"}, dtype: fp32}}
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
