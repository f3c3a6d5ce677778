"""What a training does about its probes. The probing process is a stand-in; the real one is in tests/pipeline/test_probing.py."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lt_train.runtime.errors import UserError
from lt_train.runtime.tracking import NoTracker
from lt_train.training import broadcast
from lt_train.training.checkpoints import fault_of, read_checkpoint
from lt_train.training.probes.launching import environment_for
from lt_train.training.probes.results import probe_folder, read_probes
from tests.support.probed_training import Training
from tests.support.tiny_training import Cut, CutAt


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(broadcast, "POLL_SECONDS", 0.02)
    return Training(tmp_path / "run")


class Recording(NoTracker):
    """Keeps each point once, as the tracker of wandb does: a resumed training logs its earlier points again."""

    def __init__(self, before: "Recording | None" = None) -> None:
        self.points: list[tuple[str, dict[str, float], int]] = [] if before is None else before.points
        self.tables: dict[str, list[list[Any]]] = {}

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        if (group, metrics, step) not in self.points:
            self.points.append((group, metrics, step))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables[name] = rows


def test_a_checkpoint_is_probed_every_so_many_steps_and_after_the_last_and_all_of_it_is_tracked(training: Training) -> None:
    training.scores = {2: 0.25, 4: 0.5, 5: 0.75}
    tracker = Recording()
    training(tracker)
    assert [(r.step, r.scores[0].accuracy) for r in read_probes(training.out)] == [(2, 0.25), (4, 0.5), (5, 0.75)]
    assert tracker.points == [("probes", {"needle": s}, step) for step, s in training.scores.items()]
    assert [row[:3] for row in tracker.tables["probe scores"]] == [[2, "needle", 0.25], [4, "needle", 0.5], [5, "needle", 0.75]]
    assert [row[2] for row in tracker.tables["probe answers/needle"]] == ["of step 2", "of step 4", "of step 5"]
    assert "probe of step 4: needle 50.0 ± 10.0 %" in training.printed


def test_weights_stay_while_a_probe_reads_them_and_no_longer(training: Training) -> None:
    training()
    for step in (2, 4, 5):
        place = probe_folder(training.out, step)
        assert json.loads((place / "seen.json").read_text())["step"] == step
        assert not (place / "weights").exists()
    assert training.folders() == ["checkpoint-5", "final", "probes"]


def test_training_waits_for_a_probe_only_when_the_next_is_due(training: Training) -> None:
    training.outlasts_training = True
    found = {}

    class Clock(NoTracker):
        def log(self, metrics: dict[str, Any], step: int) -> None:
            found[step] = bool(read_probes(training.out))

    training(Clock())
    assert not found[3]  # the probe of step 2 was under way
    assert found[5]  # the probe of step 4 was due before it had ended
    assert [result.step for result in read_probes(training.out)] == [2, 4, 5]
    assert "waiting for the running probe" in training.printed


def test_a_probe_that_fails_is_reported_with_its_last_line_and_training_continues(training: Training) -> None:
    training.scores = {2: -1.0}
    assert training().steps == 5
    (failed,) = [line for line in training.printed if "failed" in line]
    assert failed.startswith(
        "the probe of step 2 failed, training continues: error the needle got lost (exit code 1, full output in "
    )
    assert [result.step for result in read_probes(training.out)] == [4, 5]
    assert not (probe_folder(training.out, 2) / "weights").exists()


def test_a_training_that_is_interrupted_ends_its_probe_and_starts_it_again_though_the_checkpoint_is_gone(
    training: Training,
) -> None:
    training.seconds = 60
    with pytest.raises(Cut):
        training(CutAt(4), save_steps=3)
    assert training.started == [2] and training.folders() == ["checkpoint-3", "probes"]
    assert read_probes(training.out) == []
    training.seconds = 0.1
    training(save_steps=3)
    assert training.started == [2, 2, 4, 5]
    assert [result.step for result in read_probes(training.out)] == [2, 4, 5]


def test_a_result_that_was_not_read_before_a_kill_is_read_on_resume(training: Training) -> None:
    with pytest.raises(Cut):
        training(CutAt(3))
    place = probe_folder(training.out, 2)
    if not (place / "result.json").exists():
        subprocess.run(training.command(2), check=True)
    tracker, started = Recording(), len(training.started)
    training(tracker)
    assert [step for _, _, step in tracker.points] == [2, 4, 5]
    assert training.started[started:] == [4, 5]
    assert not (place / "weights").exists()


def test_probes_past_the_step_from_which_a_training_resumes_are_deleted(training: Training) -> None:
    with pytest.raises(Cut):
        training(CutAt(5), keep_checkpoints=2)
    (training.out / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    training.started.clear()
    training(keep_checkpoints=2)
    assert [step for step in training.started if step != 2] == [4, 5]
    assert [result.step for result in read_probes(training.out)] == [2, 4, 5]


def test_a_training_killed_after_its_last_step_finishes_its_probe_before_it_publishes(training: Training) -> None:
    class Killed(Recording):
        def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
            if step == 5:
                raise Cut
            super().log_behind(group, metrics, step)

    killed = Killed()
    with pytest.raises(Cut):
        training(killed)
    assert "final" not in training.folders() and [step for _, _, step in killed.points] == [2, 4]
    tracker = Recording(before=killed)
    training(tracker)
    assert [step for _, _, step in tracker.points] == [2, 4, 5]
    assert training.folders() == ["checkpoint-5", "final", "probes"]


def test_the_best_by_a_probe_is_kept_and_published_and_nothing_else_is_kept(training: Training) -> None:
    training.scores = {2: 0.25, 4: 0.75, 6: 0.75, 8: 0.5}
    result = training(keep_best="needle", final_weights="best", max_steps=8, save_steps=1)
    assert training.folders() == ["best-4", "checkpoint-8", "final", "probes"]
    assert result.steps == 4 and fault_of(training.out / "best-4") is None
    assert json.loads((result.folder / "measured.json").read_text()) == {"metric": "needle", "value": 0.75, "step": 4}
    weights = [(training.out / name / "model.safetensors") for name in ("final", "best-4", "checkpoint-8")]
    assert weights[0].samefile(weights[1]) and weights[0].read_bytes() != weights[2].read_bytes()
    assert "the trained model has the weights of step 4, the best by needle (0.75)" in training.printed


def test_the_best_by_held_out_loss_is_the_lowest_of_all_checkpoints(training: Training) -> None:
    how = {"max_steps": 8, "save_steps": 2, "learning_rate": 0.1, "lr_scheduler": "constant"}  # so high that it gets worse
    result = training(heldout=5, probes=None, keep_best="eval_loss", final_weights="best", **how)
    rows = [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.__getitem__)
    assert best < 8 and result.steps == best and result.eval_loss == losses[best]
    assert training.folders() == [f"best-{best}", "checkpoint-8", "final"]


def test_without_final_weights_best_the_last_weights_are_published_and_the_best_also_kept(training: Training) -> None:
    training.scores = {2: 0.75}
    assert training(keep_best="needle").steps == 5
    assert training.folders() == ["best-2", "checkpoint-5", "final", "probes"]
    assert "the trained model has the weights of step 5, the last" in training.printed


def test_a_kill_before_a_measured_checkpoint_was_kept_as_best_is_repaired(training: Training) -> None:
    with pytest.raises(Cut):
        training(CutAt(3), heldout=5, probes=None, keep_best="eval_loss", save_steps=2)
    assert "best-2" in training.folders()
    shutil.rmtree(training.out / "best-2")
    with pytest.raises(Cut):  # after step 3, which a resume logs again, and before another checkpoint
        training(CutAt(4), heldout=5, probes=None, keep_best="eval_loss", save_steps=2)
    assert read_checkpoint(training.out / "best-2").step == 2


def test_a_best_that_nothing_measured_is_an_error_and_the_probes_are_repeated(training: Training) -> None:
    training.scores = dict.fromkeys((2, 4, 5), -1.0)
    with pytest.raises(
        UserError, match=r"train\.final_weights: best: no valid weights with a measured needle.*change train\.probes"
    ):
        training(keep_best="needle", final_weights="best")
    assert "final" not in training.folders()
    training.scores = {}
    assert training(keep_best="needle", final_weights="best").steps == 5


def test_a_probing_process_is_alone_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/root"}
    assert environment_for("cpu", given) == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": ""}
    assert environment_for("cuda:6,7", given)["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert environment_for("same", given) == {"HOME": "/root"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert environment_for("same", given)["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment_for("same", {**given, "CUDA_VISIBLE_DEVICES": "4,5,6,7"})["CUDA_VISIBLE_DEVICES"] == "6"
