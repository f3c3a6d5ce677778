"""What distillation is for: with three quarters of its layers streaming the tiny reasoner stays nearer to itself than by SFT."""

from pathlib import Path

import pytest

from lt_train.evaluation.scores import read_scores
from lt_train.recipe.loading import load_recipe
from tests.support.repository import REPOSITORY
from tests.support.runs import run_in_folder


def divergence(runs: Path, name: str, distill: str) -> float:
    """KL(base || trained) on held-out answers after 15 steps."""
    settings = {
        "name": name,
        "model.base": REPOSITORY / "data/tiny-reasoner",
        "hybrid": "{layers: [2, 3, 4, 5, 6, 7], w_sink: 4, w_recent: 12}",
        "data.source": REPOSITORY / "data/ledger/train.jsonl",
        "data.limit": 60,
        "data.heldout": 6,
        "train.max_steps": 15,
        "train.learning_rate": 3e-3,
        "train.batch_size": 3,
        "train.micro_batch_size": 3,
        "train.distill": distill,
        "eval": "[{benchmark: heldout_kl, batch_size: 6}]",
    }
    recipe = load_recipe(REPOSITORY / "recipes/quickstart.yaml", [f"{key}={value}" for key, value in settings.items()])
    run_in_folder(recipe, runs, "eval")
    return read_scores(runs / recipe.name / "eval/trained/heldout_kl/scores.json").mean.value


@pytest.mark.slow
def test_at_equal_steps_the_distilled_hybrid_is_much_nearer_to_the_full_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    plain = divergence(tmp_path, "sft", "{}")
    distilled = divergence(tmp_path, "distilled", "{weight: 0.9, temperature: 2.0, hidden_weight: 10.0}")
    assert distilled < 0.7 * plain
