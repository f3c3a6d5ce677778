"""`export.push` in a run: after the check, again only where something changed, and for a run that was finished without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST
from tests.support.hub import TOKEN, StubHub
from tests.support.runs import run_in_folder
from tests.support.tiny_run import write_inputs

pytestmark = pytest.mark.slow

UNTRAINED = ["train=null", "hybrid.layers=[1, 3]", "hybrid.lazy_layer_ratio=null", "eval=[]"]
PUSH = "export.push=someone/hybrid"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with StubHub() as found:
        for name, value in (("ENDPOINT", found.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_a_finished_run_is_pushed_once_and_reported_and_again_only_what_changed(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    export = tmp_path / "tiny/export"

    def run(*overrides: str) -> str:
        return run_in_folder(load_recipe(tmp_path / "recipe.yaml", [*UNTRAINED, *overrides]), tmp_path, "export")

    run()
    assert hub.repository is None
    written = (export / EXPORT_MANIFEST).stat().st_mtime_ns

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        run(PUSH)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    printed = run(PUSH)
    assert "pushed to" in printed and "writing weights" not in printed
    assert (export / EXPORT_MANIFEST).stat().st_mtime_ns == written
    assert hub.files[EXPORT_MANIFEST] == (export / EXPORT_MANIFEST).read_bytes() and hub.private
    assert "push" not in run(PUSH)

    uploads = len(hub.uploaded)
    run(PUSH, "export.max_shard_size=1MB")
    assert hub.commits == 2 and len(hub.uploaded) > uploads and "model.safetensors" not in hub.files
    assert hub.files["model.safetensors.index.json"] == (export / "model.safetensors.index.json").read_bytes()
    run()
    assert hub.commits == 2
