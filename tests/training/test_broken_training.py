"""Something breaks: a loss or a gradient is NaN, a disk fills. The last good checkpoint stays."""

import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.checkpoints import fault_of, newest_checkpoint
from lt_train.training.log import read_log
from tests.support.broken_training import BAD, EVERY_STEP, breaks_on
from tests.support.full_disk import files_of_at_most
from tests.support.tiny_training import load_tiny, tiny_examples, train_in
from tests.support.training_log import assert_same_course


def test_a_nan_loss_names_its_step_and_its_sample_and_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    one_by_one = {"train": {**EVERY_STEP["train"], "micro_batch_size": 1}}
    with pytest.raises(UserError) as raised:
        train_in(tmp_path, one_by_one, NoTracker(), load=breaks_on(BAD))
    message = str(raised.value)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and fault_of(newest) is None
    step = int(newest.name.removeprefix("checkpoint-")) + 1
    assert f"training stopped in step {step}: the loss is nan, on {BAD.where}. {newest}, written before it, is valid" in message
    assert "lower train.learning_rate" in message
    assert not any(tmp_path.glob(f"checkpoint-{step}*"))
    weights = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert all(torch.isfinite(moments["exp_avg"]).all() for moments in weights.values())


def test_of_a_pack_every_document_is_named(tmp_path: Path) -> None:
    packed = {**EVERY_STEP, "data": {"packing": True, "max_length": 64}}
    packed["train"] = {**EVERY_STEP["train"], "batch_size": 2, "micro_batch_size": 1, "max_steps": 30}
    with pytest.raises(UserError) as raised:
        train_in(tmp_path, packed, NoTracker(), load=breaks_on(BAD))
    named = str(raised.value).partition("nan, on ")[2].partition(". ")[0].split(", ")
    assert BAD.where in named
    assert 24 < sum(len(e) for e in tiny_examples().train if e.where in named) <= 64


def test_a_gradient_that_is_nan_stops_before_the_weights_move_and_names_all_samples_of_the_step(tmp_path: Path) -> None:
    def load(dtype: torch.dtype) -> torch.nn.Module:
        model, seen = load_tiny(dtype), []

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            return gradient * math.nan if len(seen) == 6 else gradient  # the second of two micro-batches of step 3

        model.model.norm.weight.register_hook(poison)
        return model

    with pytest.raises(UserError, match=r"in step 3: the norm of the gradient is nan, on made up:\d+(, made up:\d+){3}\. .*-2, wr"):
        train_in(tmp_path, EVERY_STEP, NoTracker(), load=load)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_nan_on_held_out_samples_names_them_and_is_not_saved(tmp_path: Path) -> None:
    bad = tiny_examples(5).heldout[3]
    settings = {"train": {**EVERY_STEP["train"], "eval_steps": 2}, "data": {"heldout": 5}}
    with pytest.raises(UserError) as raised:
        train_in(tmp_path, settings, NoTracker(), load=breaks_on(bad))
    assert "after step 2: the held-out loss is nan, on " in str(raised.value) and bad.where in str(raised.value)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


class AtStep(NoTracker):
    """Does something when a step is logged, which comes before its checkpoint."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step == self.step:
            self.do()


@pytest.mark.parametrize(
    ("size", "written_by"), [(20_000, "safetensors"), (150_000, "torch"), (1_000, "Python")], ids=lambda given: str(given)
)
def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before_it_to_go_on_from(
    tmp_path: Path, size: int, written_by: str, train_tiny: Callable[..., Any]
) -> None:
    settings = {"train": {**EVERY_STEP["train"], "logging_steps": 1, "save_steps": 2}}
    train_tiny("uninterrupted", **settings)
    run = tmp_path / "run"
    with ExitStack() as disk, pytest.raises(UserError) as raised:
        train_in(run, settings, AtStep(4, lambda: disk.enter_context(files_of_at_most(size))))
    message = str(raised.value)
    assert "the checkpoint of step 4 could not be written" in message and "Fix: free disk space" in message
    assert f"run the same command again; it resumes from {run / 'checkpoint-2'}, which is valid" in message
    assert {"safetensors": "serializing", "torch": "inline_container", "Python": "too large"}[written_by] in message
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-2"]  # the room is free again
    train_in(run, settings, NoTracker())
    assert_same_course(run, tmp_path / "uninterrupted")


def test_a_log_that_cannot_be_written_is_the_same_error(tmp_path: Path) -> None:
    settings = {"train": {**EVERY_STEP["train"], "logging_steps": 1, "save_steps": 2}}
    named = r"log\.jsonl of step 4 could not be written.*checkpoint-2, which is valid"
    with ExitStack() as disk, pytest.raises(UserError, match=named):
        train_in(tmp_path, settings, AtStep(3, lambda: disk.enter_context(files_of_at_most(1))))
    train_in(tmp_path, settings, NoTracker())
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system that holds 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before_it(small_disk: Path) -> None:
    settings = {"train": {**EVERY_STEP["train"], "keep_checkpoints": 9}}  # a checkpoint has some 200 KB
    with pytest.raises(
        UserError, match=r"the checkpoint of step \d could not be written: .* run the same command again; it resumes"
    ):
        train_in(small_disk, settings, NoTracker())
    newest = newest_checkpoint(small_disk)
    assert newest is not None and fault_of(newest) is None
    with pytest.raises(UserError, match=f"{newest.name}, which is valid"):  # as full as before, as good as before
        train_in(small_disk, settings, NoTracker())
    assert newest_checkpoint(small_disk) == newest
