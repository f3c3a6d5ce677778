"""A training that was interrupted resumes with the same result."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training.log import track_log
from lt_train.training.settings import settings_of_training
from tests.support.tiny_training import SPEC, SPLIT, tiny_recipe, train_in
from tests.support.training_log import assert_same_course, steps

# 22 examples in batches of 4: 6 steps an epoch, the last one short
TWO_EPOCHS: dict[str, Any] = {"train": {"max_steps": None, "epochs": 2, "save_steps": 2, "warmup_ratio": 0.2}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training over TWO_EPOCHS that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_in(folder, TWO_EPOCHS, NoTracker())
    return folder


@pytest.mark.parametrize("cut", [5, 9], ids=["mid-epoch", "second epoch"])
def test_resumed_training_has_the_loss_of_an_uninterrupted_one_at_every_step(
    train_tiny, train_until, tmp_path: Path, uninterrupted: Path, cut: int
) -> None:
    train_until(cut, "cut", **TWO_EPOCHS)
    assert len(steps(tmp_path / "cut")) == cut
    train_tiny("cut", **TWO_EPOCHS)
    assert len(steps(uninterrupted)) == 12
    assert_same_course(tmp_path / "cut", uninterrupted)


def test_a_resumed_lora_has_the_losses_of_an_uninterrupted_one(train_tiny, train_until, tmp_path: Path) -> None:
    settings = {
        "train": {"method": "lora", "max_steps": 8, "save_steps": 3, "logging_steps": 2},
        "lora": {"rank": 4, "dropout": 0.1},  # dropout: the state of the rng is restored too
    }
    train_tiny("uninterrupted", **settings)
    train_until(6, "cut", **settings)
    train_tiny("cut", **settings)
    assert_same_course(tmp_path / "cut", tmp_path / "uninterrupted")


def test_a_resumed_training_of_split_layers_has_the_losses_of_an_uninterrupted_one_and_they_fall(
    train_tiny, train_until, tmp_path: Path
) -> None:
    distill = {"weight": 0.3, "hidden_weight": 0.1, "teacher": "copy"}
    settings: dict[str, Any] = {
        "train": {"max_steps": 8, "save_steps": 3, "batch_size": 8, "gradient_checkpointing": True, "distill": distill},
        "data": {"packing": True, "max_length": 48},
    }
    train_tiny("uninterrupted", spec=SPLIT, **settings)
    train_until(5, "cut", spec=SPLIT, **settings)
    with pytest.raises(UserError, match="KV heads that stream in split layers"):
        train_tiny("cut", spec=replace(SPLIT, split_layers=((2, (1,)), (3, (1,)))), **settings)
    train_tiny("cut", spec=SPLIT, **settings)
    assert_same_course(tmp_path / "cut", tmp_path / "uninterrupted")
    losses = [row["loss"] for row in steps(tmp_path / "cut")]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("settings", "matters"),
    [
        ({}, False),
        ({"train": {"method": "lora"}, "lora": {"dropout": 0.1}}, True),
        ({"train": {"trl": {"neftune_noise_alpha": 5.0}}}, True),
    ],
    ids=["nothing random", "dropout", "noise"],
)
def test_the_number_of_processes_matters_where_each_has_its_own_rng(settings: dict[str, Any], matters: bool) -> None:
    recipe = tiny_recipe(settings)
    one, two = (settings_of_training(recipe, recipe.train, SPEC, "", processes) for processes in (1, 2))
    assert (one != two) == matters


def test_a_half_written_checkpoint_is_passed_over_and_written_again(
    train_tiny, train_until, tmp_path: Path, uninterrupted: Path, capsys
) -> None:
    train_until(7, "cut", **TWO_EPOCHS)
    newest = tmp_path / "cut" / "checkpoint-6"
    (newest / "manifest.json").unlink()
    (newest / "optimizer.pt").write_bytes(b"")
    train_tiny("cut", **TWO_EPOCHS)
    printed = capsys.readouterr().out
    assert "checkpoint-6: not a valid checkpoint" in printed and "resumed from checkpoint-4" in printed
    assert_same_course(tmp_path / "cut", uninterrupted)


def test_a_training_interrupted_before_its_first_checkpoint_starts_again(
    train_tiny, train_until, tmp_path: Path, uninterrupted: Path
) -> None:
    train_until(2, "cut", **TWO_EPOCHS)
    train_tiny("cut", **TWO_EPOCHS)
    assert_same_course(tmp_path / "cut", uninterrupted)


def test_a_finished_training_is_not_done_again(train_tiny, tmp_path: Path) -> None:
    first = train_tiny("run", data={"heldout": 3})
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert train_tiny("run", data={"heldout": 3}) == first
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


class Recorder(NoTracker):
    def __init__(self) -> None:
        self.points: list[tuple[int, str]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.points += [(step, name) for name in metrics]


def test_the_log_of_a_training_that_was_killed_and_its_resume_track_what_a_whole_one_does(train_until, tmp_path: Path) -> None:
    whole, resumed = Recorder(), Recorder()
    settings = {"train": {"max_steps": 6, "save_steps": 2, "eval_steps": 3}, "data": {"heldout": 3}}
    train_in(tmp_path / "whole", settings, whole)
    train_until(5, "cut", **settings)
    track_log(resumed, tmp_path / "cut/log.jsonl")
    assert {(3, "train/eval_loss"), (1, "train/loss"), (4, "train/loss")} <= set(resumed.points)
    train_in(tmp_path / "cut", settings, resumed)
    assert set(resumed.points) == set(whole.points)


def test_a_training_killed_after_its_last_checkpoint_only_publishes_it(train_tiny, tmp_path: Path) -> None:
    # 5 steps end in mid-epoch, where Trainer itself would take a sixth
    first = train_tiny("run", train={"max_steps": 5}, data={"heldout": 3})
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    assert train_tiny("run", train={"max_steps": 5}, data={"heldout": 3}) == first
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_training_is_not_continued(train_tiny, train_until, tmp_path: Path, finished: bool) -> None:
    if finished:
        train_tiny("run")
    else:
        train_until(3, "run", train={"save_steps": 2})
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.003, 0\.5"):
        train_tiny("run", train={"learning_rate": 0.5})


def test_other_data_is_not_continued(train_tiny, train_until) -> None:
    train_until(3, "run", train={"save_steps": 2})
    with pytest.raises(UserError, match="SHA-256 of the training data"):
        train_tiny("run", train={"save_steps": 2}, examples=21)


def test_how_often_to_save_may_change_on_the_way(train_tiny, train_until) -> None:
    train_until(4, "run", train={"save_steps": 2, "keep_checkpoints": 1})
    assert train_tiny("run", train={"save_steps": 3, "keep_checkpoints": 5, "eval_steps": 1}).steps == 4


def test_a_training_that_ran_out_of_memory_resumes_with_smaller_micro_batches_and_the_same_losses(
    train_tiny, train_until, tmp_path: Path, uninterrupted: Path
) -> None:
    train_until(5, "cut", **TWO_EPOCHS)
    smaller = {"micro_batch_size": 1, "gradient_checkpointing": True}
    train_tiny("cut", train={**TWO_EPOCHS["train"], **smaller})
    assert_same_course(tmp_path / "cut", uninterrupted, but=["token_accuracy"])  # a mean over micro-batches


def test_micro_batches_that_draw_their_own_dropout_stay_as_they_are(train_tiny, train_until) -> None:
    settings = {"train": {"method": "lora", "save_steps": 2}, "lora": {"dropout": 0.1}}
    train_until(3, "run", **settings)
    with pytest.raises(UserError, match=r"train\.micro_batch_size: 2, 1"):
        train_tiny("run", **{**settings, "train": {**settings["train"], "micro_batch_size": 1}})


def test_the_log_forgets_what_was_logged_past_the_checkpoint_and_a_cut_line(train_tiny, train_until, tmp_path: Path) -> None:
    train_until(6, "run", **TWO_EPOCHS)
    log = tmp_path / "run" / "log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 7, "lo')
    train_tiny("run", **TWO_EPOCHS)
    assert [row["step"] for row in steps(tmp_path / "run")] == list(range(1, 13))
    counts = [row["num_tokens"] for row in steps(tmp_path / "run")]
    assert counts == sorted(counts)
