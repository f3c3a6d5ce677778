from pathlib import Path

import pytest

from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import BLOCK
from lt_train.training.checkpoints import (
    MANIFEST,
    check_same_settings,
    fault_of,
    last_valid_checkpoint,
    publish_weights,
    read_checkpoint,
    remove_old_checkpoints,
    valid_final,
    write_manifest,
)


def save(run: Path, step: int, *, valid: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "rng_state_0.pth").write_bytes(b"state")
    (folder / "global_step" / "rank_0.pt").write_bytes(b"shard")
    if valid:
        write_manifest(folder, step, {"seed": 1})
    return folder


def found(run: Path) -> tuple[int | None, list[str]]:
    printed: list[str] = []
    checkpoint = last_valid_checkpoint(run, printed.append)
    return (checkpoint.step if checkpoint else None), printed


def test_the_newest_valid_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save(tmp_path, step)
    assert found(tmp_path) == (100, [])


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert found(tmp_path) == (None, [])
    assert found(tmp_path / "nowhere") == (None, [])


def test_a_half_written_checkpoint_is_named_passed_over_and_kept_aside(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20, valid=False)
    step, printed = found(tmp_path)
    assert step == 10
    assert len(printed) == 1 and "checkpoint-20" in printed[0] and "killed" in printed[0]
    assert (tmp_path / "unfinished-checkpoint" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-20").exists()


def test_half_written_checkpoints_of_many_kills_do_not_pile_up(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, valid=False)
        assert found(tmp_path)[0] is None
    assert [p.name for p in tmp_path.iterdir()] == ["unfinished-checkpoint"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda f: (f / "global_step" / "rank_0.pt").unlink(), "rank_0.pt is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "has 3 bytes instead of 5120"),
        (lambda f: (f / "optimizer.pt").write_bytes(b"Moments"), "content of optimizer.pt changed"),
        (lambda f: (f / MANIFEST).write_text('{"step": 2'), "not a complete checkpoint manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_never_deleted(tmp_path: Path, damage, fault: str) -> None:
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    step, printed = found(tmp_path)
    assert step == 10
    assert fault in printed[0]
    assert (tmp_path / "damaged-checkpoint-20-1").is_dir()
    damage(save(tmp_path, 20))
    found(tmp_path)
    assert (tmp_path / "damaged-checkpoint-20-2").is_dir()


def test_damage_in_the_middle_of_a_file_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    content = bytearray(3 * BLOCK + 5)
    (folder / "model.safetensors").write_bytes(content)
    write_manifest(folder, 1, {})
    assert fault_of(folder) is None
    content[BLOCK + BLOCK // 2] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "changed" in (fault_of(folder) or "")


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_another_recipes_checkpoint_is_refused_naming_what_differs(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 10))
    check_same_settings(checkpoint, {"seed": 1})
    with pytest.raises(UserError, match=r"seed: 1, 2\n  train\.x: None, 3"):
        check_same_settings(checkpoint, {"seed": 2, "train.x": 3})


def test_published_weights_come_without_what_only_training_needs(tmp_path: Path) -> None:
    publish_weights(read_checkpoint(save(tmp_path, 10)), tmp_path / "final")
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    final = valid_final(tmp_path / "final", print)
    assert final is not None and final.step == 10


def test_published_weights_survive_the_deletion_of_their_checkpoint(tmp_path: Path) -> None:
    publish_weights(read_checkpoint(save(tmp_path, 10)), tmp_path / "final")
    save(tmp_path, 20)
    remove_old_checkpoints(tmp_path, keep=1)
    assert fault_of(tmp_path / "final") is None


def test_a_damaged_final_folder_is_set_aside(tmp_path: Path) -> None:
    publish_weights(read_checkpoint(save(tmp_path, 10)), tmp_path / "final")
    (tmp_path / "final" / "config.json").write_text("{ }")
    printed: list[str] = []
    assert valid_final(tmp_path / "final", printed.append) is None
    assert "written again" in printed[0]
    assert (tmp_path / "damaged-final-1").is_dir() and not (tmp_path / "final").exists()
