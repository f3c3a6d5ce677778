import pytest
import torch

from lt_train.export.manifest import content_fingerprint, is_exported, make_manifest, read_manifest
from lt_train.export.verify import Check
from lt_train.export.weights import in_memory
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST
from tests.support.tiny_exports import metadata, tiny_hybrid

CHECK = Check("HybridQwen3ForCausalLM", "float32", 0.0, 12.5, 1e-5, 48, 0)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / "config.json").write_text("{}")
    make_manifest(tmp_path, "abc", CHECK).write(tmp_path)
    return tmp_path


def test_an_export_of_the_same_content_is_recognised(folder):
    assert is_exported(folder, "abc")
    assert read_manifest(folder).check == CHECK


def test_nothing_and_an_empty_folder_are_no_export(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not is_exported(tmp_path / "nothing", "abc")
    assert not is_exported(tmp_path / "empty", "abc")


def test_another_export_is_not_overwritten(folder):
    with pytest.raises(UserError, match="another export"):
        is_exported(folder, "other")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no export"):
        is_exported(tmp_path, "abc")


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b"1235"), lambda file: file.write_bytes(b"12"), lambda file: file.unlink()]
)
def test_a_damaged_export_is_named(folder, damage):
    damage(folder / "weights")
    with pytest.raises(UserError, match="missing or changed since it was exported: weights"):
        is_exported(folder, "abc")


@pytest.mark.parametrize("text", ['{"format": 1, "con', '{"format": 99}', "[]"])
def test_a_cut_or_foreign_manifest_is_an_error(folder, text):
    (folder / EXPORT_MANIFEST).write_text(text)
    with pytest.raises(UserError, match=EXPORT_MANIFEST):
        is_exported(folder, "abc")


def test_the_fingerprint_follows_weights_files_and_facts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model = tiny_hybrid()

    def fingerprint(**changed):
        return content_fingerprint(tmp_path, in_memory(model), torch.float32, metadata(**changed))

    seen = [fingerprint(), fingerprint(recipe="other")]
    assert fingerprint() == seen[0]
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    seen.append(fingerprint())
    (tmp_path / "config.json").write_text("{ }")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def verified(lt_train, folder):
    code, out, err = lt_train("export", "--verify", folder)
    assert "Traceback" not in out + err and err.count("\n") == (code != 0)
    return code, out + err


def test_an_export_as_it_was_written_is_verified(lt_train, folder):
    (folder / ".gitattributes").touch()  # the hub's
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/config.json.metadata").touch()
    assert verified(lt_train, folder) == (0, f"{folder}: all 2 files are those that were exported, and there are no others\n")


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"1235"), "weights: changed since it was exported"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "modeling.py").write_text("import os"), "modeling.py: not a file of the export"),
        (lambda folder: (folder / "code").mkdir() or (folder / "code/run.py").touch(), "code/run.py: not a file of the export"),
        (lambda folder: (folder / "link.py").symlink_to("/nowhere"), "link.py: not a file of the export"),
    ],
)
def test_a_file_that_was_tampered_with_is_named(lt_train, folder, tamper, fault):
    tamper(folder)
    assert verified(lt_train, folder) == (
        2,
        f"error {folder}: {fault}. Fix: run no code of it, and export or download it again\n",
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"format": 1}', "not a complete export manifest"),
        ('{"format": 1, "content": "", "files": {"a": 1}, "check": {}}', "not a complete export manifest"),
        ('{"format": 1, "content": "", "files": [], "check": {}}', "not a complete export manifest"),
        ('{"form', "not a complete export manifest"),
        (None, f"no export: there is no {EXPORT_MANIFEST}"),
    ],
)
def test_what_has_no_manifest_cannot_be_verified(lt_train, folder, written, message):
    (folder / EXPORT_MANIFEST).unlink() if written is None else (folder / EXPORT_MANIFEST).write_text(written)
    code, shown = verified(lt_train, folder)
    assert (code, message in shown) == (2, True), shown


def test_a_folder_that_is_not_there_cannot_be_verified(lt_train, tmp_path):
    assert verified(lt_train, tmp_path / "none") == (
        2,
        f"error {tmp_path / 'none'}: no such folder. Fix: name the folder of an export, runs/<name>/export\n",
    )
