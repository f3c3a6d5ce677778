"""A tiny hybrid and its data, trained in about a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.tracking import NoTracker
from lt_train.training.trainer import LoadModel, TrainResult
from tests.support import tiny_training


@pytest.fixture
def train_tiny(tmp_path: Path) -> Callable[..., TrainResult]:
    """train_tiny("a", **settings of the recipe) trains in tmp_path/a; called again with the same folder it resumes."""

    def train(
        folder: str, *, examples: int = 22, load: LoadModel | None = None, spec: HybridSpec = tiny_training.SPEC, **settings: Any
    ) -> TrainResult:
        return tiny_training.train_in(tmp_path / folder, settings, NoTracker(), examples, load, spec)

    return train


@pytest.fixture
def train_until(tmp_path: Path) -> Callable[..., None]:
    """train_until(7, "a", **settings): the same, killed while step 7 is logged, before a checkpoint of that step."""

    def train(
        step: int, folder: str, *, load: LoadModel | None = None, spec: HybridSpec = tiny_training.SPEC, **settings: Any
    ) -> None:
        with pytest.raises(tiny_training.Cut):
            tiny_training.train_in(tmp_path / folder, settings, tiny_training.CutAt(step), load=load, spec=spec)

    return train
