"""What a training logged, and whether two trainings logged the same."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lt_train.training.log import read_log
from tests.support.repository import REPOSITORY

GOLDEN: dict[str, Any] = json.loads((REPOSITORY / "tests/golden/quickstart_losses.json").read_text())
"""Losses and norms of the gradient of the quickstart's 60 steps, and the held-out loss after them."""


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.jsonl") if "loss" in row]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(folder / "log.jsonl") if "loss" in row]


def evaluations(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_log(folder / "log.jsonl") if "eval_loss" in row}


def assert_same_course(one: Path, other: Path, tolerance: float = 1e-6, but: Sequence[str] = ()) -> None:
    names = {"loss", "learning_rate", "grad_norm", "epoch", "tokens", "num_tokens", "token_accuracy"} - set(but)
    assert [row["step"] for row in steps(one)] == [row["step"] for row in steps(other)]
    for mine, theirs in zip(steps(one), steps(other), strict=True):
        for name in sorted(names):
            assert mine[name] == pytest.approx(theirs[name], abs=tolerance), (mine["step"], name)
