"""A run and an export made by an earlier lt_train still resume, show, report, train on and load.

The fixture was made by commit d27557d from a base of 0.05 M random parameters; its recipe.yaml stands in the folder.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import processes

FIXTURE = Path(__file__).parent / "fixtures/run_before_the_folders"

pytestmark = pytest.mark.slow


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which the run was made: base, data, recipe and runs/old. Commands run there."""
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def succeeds(lt_train: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that succeeds; returns what it printed."""

    def run(*arguments: str) -> str:
        code, printed, errors = lt_train(*arguments)
        assert code == 0, printed + errors
        return printed

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that every command writes again, and the markers, which are brought up to date."""
    renewed = (".lock", "recipe.yaml", "inputs.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in renewed and path.parent.name != "stages"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_old_run_is_found_finished(old, succeeds):
    before = contents(old / "finished/old")
    succeeds("run", "recipe.yaml", "--runs", "finished")
    assert contents(old / "finished/old") == before


def test_an_old_run_shows_its_results(old, succeeds):
    shown = succeeds("show", "finished/old")
    assert "ledger: 4 of 6 problems" in shown and "reach, trained" in shown


def test_an_old_run_is_reported(old, succeeds):
    succeeds("report", "finished/old", "--out", "report.html")
    assert "reach, trained" in (old / "report.html").read_text(encoding="utf-8")


def test_an_old_training_resumes_from_its_checkpoint(old, succeeds):
    """As after a kill between the last checkpoint and the end."""
    run = old / "finished/old"
    final = (run / "train/final/adapter_model.safetensors").read_bytes()
    log = (run / "train/log.jsonl").read_bytes()
    shutil.rmtree(run / "train/final")
    (run / "stages/train.json").unlink()
    succeeds("train", "recipe.yaml", "--runs", "finished")
    assert (run / "train/final/adapter_model.safetensors").read_bytes() == final
    assert (run / "train/log.jsonl").read_bytes() == log  # no step was trained again


def test_an_old_export_loads_with_its_own_code(old):
    program = (
        "import json, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('finished/old/export', trust_remote_code=True)\n"
        "ids = torch.arange(4, 44)[None]\n"
        "print(json.dumps([type(model).__module__.split('.')[0], model(ids).logits[0, -1, :4].tolist()]))"
    )
    printed = processes.run([sys.executable, "-P", "-c", program], cwd=old, env={"HF_MODULES_CACHE": str(old / "hub")})
    assert printed.returncode == 0, printed.stderr
    module, logits = json.loads(printed.stdout)
    assert module == "transformers_modules"
    assert logits == pytest.approx(LOGITS, abs=1e-4)


LOGITS = [0.68850, 0.41730, -0.58065, 0.77404]
"""Of commit d27557d's own load of this export, on the last of tokens 4 to 43."""


def test_samples_of_an_old_evaluation_count_when_it_is_requested_again(old, succeeds):
    """Nothing is drawn again: the model's fingerprint is the one of before."""
    run = old / "finished/old"
    before = contents(run / "eval")
    (run / "stages/eval.json").unlink()
    succeeds("eval", "recipe.yaml", "--runs", "finished")
    assert contents(run / "eval") == before


def test_a_changed_evaluation_of_an_old_run_is_measured(old, succeeds):
    succeeds("eval", "recipe.yaml", "--runs", "finished", "--set", "eval.0.limit=5")
    scores = json.loads((old / "finished/old/eval/trained/ledger/scores.json").read_text(encoding="utf-8"))
    assert scores["problems"] == 5
