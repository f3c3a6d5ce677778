import pytest
import torch

from lt_train.export.checkpoint import _empty_folder, export_hybrid
from lt_train.export.weights import in_memory
from lt_train.runtime.errors import UserError
from tests.support.full_disk import files_of_at_most
from tests.support.tiny_exports import metadata, tiny_hybrid, tiny_tokenizer


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    leftover = tmp_path / ".export.partial"
    leftover.mkdir()
    (leftover / "stale.py").write_text("half")
    with _empty_folder(tmp_path / "export", "partial") as partial:
        assert partial == leftover and not list(partial.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), _empty_folder(tmp_path / "runs/export", "partial") as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert not list((tmp_path / "runs").iterdir())


def test_a_renamed_folder_stays(tmp_path):
    with _empty_folder(tmp_path / "export", "partial") as partial:
        (partial / "weights").write_bytes(b"whole")
        partial.rename(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export/weights").read_bytes() == b"whole"


def test_an_export_that_fills_the_disk_leaves_nothing_and_reports_a_fix(tmp_path):
    with (
        files_of_at_most(60_000),
        pytest.raises(UserError, match=r"model\.safetensors of the export could not be .* Fix: free some"),
    ):
        export_hybrid(in_memory(tiny_hybrid()), tiny_tokenizer(), tmp_path / "export", metadata(), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
