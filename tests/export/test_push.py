"""Exports are pushed to a stand-in for the hub by the hub's own client."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lt_train.export.manifest import make_manifest
from lt_train.export.push import push_export
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST
from tests.support import processes
from tests.support.hub import TOKEN, StubHub
from tests.support.repository import ENVIRONMENT

REPO = "someone/hybrid"
SHARDS = {"model-00001-of-00002.safetensors": b"first" * 100, "model-00002-of-00002.safetensors": b"second" * 100}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with StubHub() as found:
        for name, value in (("ENDPOINT", found.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_in(tmp_path / "export", {"config.json": b"{}", "README.md": b"---\ntags: [lt-train]\n---\n# tiny\n", **SHARDS})


def export_in(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    make_manifest(folder, "abc", "not compared here").write(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(folder: Path) -> list[str]:
    lines: list[str] = []
    push_export(folder, REPO, lines.append)
    return lines


def hashes(*contents: bytes) -> set[str]:
    return {hashlib.sha256(content).hexdigest() for content in contents}


def test_a_push_makes_a_private_repository_with_the_files_of_the_export(hub: StubHub, folder: Path) -> None:
    before = contents(folder)
    assert push(folder) == [f"pushed to {hub.url}/{REPO}"]
    assert hub.repository == REPO and hub.private
    assert hub.files == before | {".gitattributes": hub.files[".gitattributes"]}
    assert set(hub.uploaded) == hashes(*SHARDS.values())
    assert contents(folder) == before


def test_a_second_push_uploads_what_changed_and_removes_what_the_first_one_left(hub: StubHub, folder: Path, tmp_path: Path) -> None:
    push(folder)
    push(folder)
    assert hub.commits == 1 and len(hub.uploaded) == 2
    name, kept = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    later = export_in(tmp_path / "later", {"config.json": b"{}", "README.md": b"# other\n", "model.safetensors": SHARDS[name]})
    push(later)
    assert len(hub.uploaded) == 2, "a renamed file was uploaded again"
    assert set(hub.files) == {*contents(later), ".gitattributes"} and kept not in hub.files


def test_a_repository_of_something_else_is_left_alone(hub: StubHub, folder: Path) -> None:
    hub.repository, hub.files = REPO, {"notes.txt": b"mine"}
    with pytest.raises(UserError, match=r"holds no export, but files such as notes.txt; nothing was pushed"):
        push(folder)
    assert hub.files == {"notes.txt": b"mine"}


def test_that_a_repository_is_public_is_reported(hub: StubHub, folder: Path) -> None:
    hub.repository = REPO
    assert push(folder)[0] == f"warning: {REPO} is a public repository"


@pytest.mark.parametrize("damage", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_changed_export_is_not_pushed(damage: str, hub: StubHub, folder: Path) -> None:
    (folder / damage).write_bytes(b"tampered")
    with pytest.raises(UserError, match=f"{damage}: changed since it was exported"):
        push(folder)
    assert hub.repository is None


def test_without_a_token_or_offline_nothing_is_tried(hub: StubHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"export.push: someone/hybrid: HF_TOKEN is not set in the environment"):
        push(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(folder)
    assert hub.repository is None


def test_a_token_that_is_refused_is_not_in_the_message(hub: StubHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match=r"401.*is complete.*HF_TOKEN may write there") as refused:
        push(folder)
    assert "hf_secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_hub_that_cannot_be_reached_leaves_the_export_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubHub() as gone:
        pass
    for name, value in (("ENDPOINT", gone.url), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = contents(folder)
    with pytest.raises(UserError, match=f"see that {gone.url} can be reached"):
        push(folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_push_that_was_killed_resumes_with_what_is_missing(hub: StubHub, folder: Path, tmp_path: Path) -> None:
    hub.free_uploads = 1
    settings = f"dict(ENDPOINT={hub.url!r}, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True)"
    program = (
        "from huggingface_hub import constants\n"
        f"vars(constants).update({settings})\n"
        "from pathlib import Path\n"
        "from lt_train.export.push import push_export\n"
        f"push_export(Path({str(folder)!r}), {REPO!r}, print)"
    )
    pushing = processes.start_python([sys.executable, "-c", program], tmp_path / "output", env=ENVIRONMENT | {"HF_TOKEN": TOKEN})
    try:
        assert hub.holding.wait(120), "no second upload came"
    finally:
        pushing.kill()
        processes.exit_code(pushing)
    assert len(hub.uploaded) == 1 and hub.commits == 0 and EXPORT_MANIFEST not in hub.files
    hub.free_uploads = 10
    push(folder)
    assert sorted(hub.uploaded) == sorted(hashes(*SHARDS.values())), "a file was uploaded twice"
    assert hub.files.items() >= contents(folder).items()
