"""`lt-train train` in two processes, with the environment that torchrun sets."""

import json
from itertools import islice
from pathlib import Path

import pytest

from lt_train.recipe.loading import load_recipe
from tests.support.processes import call_in_ranks
from tests.support.repository import REPOSITORY
from tests.support.runs import call_lt_train, run_in_folder
from tests.support.training_log import assert_same_course, steps

RECIPE = f"""
name: NAME
model: {{base: {REPOSITORY / "data/tiny-reasoner"}, dtype: fp32}}
hybrid: {{lazy_layer_ratio: 0.5, strategy: periodic, w_sink: 4, w_recent: 12}}
data: {{source: TRACES, format: still, reasoning_tags: keep, max_length: 256, heldout: 4}}
train: {{method: full, learning_rate: 1.0e-3, max_steps: 4, batch_size: 4, micro_batch_size: 1, logging_steps: 1, save_steps: 2}}
"""


def write_recipe(folder: Path, name: str) -> Path:
    traces, path = folder / "traces.jsonl", folder / f"{name}.yaml"
    with open(REPOSITORY / "data/ledger/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 16)]
    for at, row in enumerate(rows):
        row["combined_text"] = row["combined_text"][: 40 + 10 * at]  # samples of unlike lengths
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path.write_text(RECIPE.replace("TRACES", str(traces)).replace("NAME", name), encoding="utf-8")
    return path


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_the_main_one_alone_prints(tmp_path: Path) -> None:
    command = ["train", str(write_recipe(tmp_path, "two")), "--runs", str(tmp_path)]
    first, second = call_in_ranks(call_lt_train, command, outputs=tmp_path / "printed")
    assert first[0] == 0, first
    assert "the trained model has the weights of step 4" in first[1] and "training 4/4" in first[1]
    assert second == (0, "")

    run_in_folder(load_recipe(write_recipe(tmp_path, "one")), tmp_path, "train")
    two, one = (tmp_path / name / "train" for name in ("two", "one"))
    assert_same_course(two, one, tolerance=1e-3, but=["token_accuracy", "grad_norm"])
    norms = [[row["grad_norm"] for row in steps(folder)] for folder in (two, one)]
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-3)
