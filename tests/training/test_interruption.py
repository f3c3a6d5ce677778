"""SIGTERM in the midst of a training, as SLURM sends it before it preempts a job."""

import signal
from pathlib import Path
from typing import Any

import pytest

from lt_train.runtime.interruption import Interrupted
from lt_train.runtime.tracking import NoTracker
from lt_train.training import interruption
from lt_train.training.checkpoints import fault_of
from tests.support.tiny_training import SignalAt, train_in
from tests.support.training_log import assert_same_course, steps

# 22 examples in batches of 4: 6 steps an epoch, the last one short
TWO_EPOCHS: dict[str, Any] = {"train": {"max_steps": None, "epochs": 2, "save_steps": 100, "warmup_ratio": 0.2}}


def test_sigterm_saves_a_checkpoint_from_which_the_training_resumes_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train_in(tmp_path / "uninterrupted", TWO_EPOCHS, NoTracker())
    with pytest.raises(Interrupted, match="the checkpoint of step 8 is saved") as stopped:
        train_in(tmp_path / "stopped", TWO_EPOCHS, SignalAt(7))  # step 7 has ended when it is logged
    assert stopped.value.exit_code == 143
    assert fault_of(tmp_path / "stopped" / "checkpoint-8") is None and len(steps(tmp_path / "stopped")) == 8
    assert signal.getsignal(signal.SIGTERM) == before
    train_in(tmp_path / "stopped", TWO_EPOCHS, NoTracker())
    assert_same_course(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_a_step_that_takes_longer_than_the_grace_period_is_given_up_for_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "GRACE_SECONDS", 0.01)
    with pytest.raises(Interrupted, match=r"no checkpoint could be saved within 0 s, there is none yet"):
        train_in(tmp_path / "none", TWO_EPOCHS, SignalAt(3))
    settings = {"train": {**TWO_EPOCHS["train"], "save_steps": 2}}
    with pytest.raises(Interrupted, match=r"no checkpoint could be saved within 0 s, the last one is .*checkpoint-4"):
        train_in(tmp_path / "some", settings, SignalAt(5))
    assert train_in(tmp_path / "some", settings, NoTracker()).steps == 12
