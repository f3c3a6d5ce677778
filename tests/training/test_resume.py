"""A training that was cut off goes on as if it had not been."""

from pathlib import Path
from typing import Any

import pytest

from lt_train.errors import UserError
from lt_train.training.log import read_log

# 22 examples in batches of 4: 6 steps an epoch, the last one short
TWO_EPOCHS: dict[str, Any] = {"train": {"max_steps": None, "epochs": 2, "save_steps": 2, "warmup_ratio": 0.2}}


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(folder / "log.jsonl") if "loss" in row]


def assert_same_course(one: Path, other: Path) -> None:
    assert [row["step"] for row in steps(one)] == [row["step"] for row in steps(other)]
    for mine, theirs in zip(steps(one), steps(other), strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "num_tokens", "token_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-6), (mine["step"], name)


@pytest.mark.parametrize("cut", [5, 9], ids=["mid-epoch", "second epoch"])
def test_resumed_training_has_the_loss_of_an_uninterrupted_one_at_every_step(
    train_tiny, train_until, tmp_path: Path, cut: int
) -> None:
    train_tiny("whole", **TWO_EPOCHS)
    train_until(cut, "cut", **TWO_EPOCHS)
    assert len(steps(tmp_path / "cut")) == cut
    train_tiny("cut", **TWO_EPOCHS)
    assert len(steps(tmp_path / "whole")) == 12
    assert_same_course(tmp_path / "cut", tmp_path / "whole")
