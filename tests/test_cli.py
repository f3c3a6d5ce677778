import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt_train import cli
from tests.support.made_runs import made_run
from tests.support.repository import ENVIRONMENT, REPOSITORY

BROKEN = """
name: broken
model: {base: nowhere/at/all}
hybrid: {lazy_layer_ratio: 2, w_recnt: 4}
data: {source: missing.jsonl, format: still}
"""


def test_every_fault_of_a_recipe_is_shown_at_once_without_traceback(lt_train, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    code, out, err = lt_train("validate", path)
    assert code == 2
    for fault in ("did you mean w_recent?", "data.max_length: missing", "model.base", "lazy_layer_ratio"):
        assert fault in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["validate", "nowhere.yaml"], "nowhere.yaml"),
        (["validate"], "Missing argument"),
        (["validate", "recipes/quickstart.yaml", "--sett", "a=1"], "No such option"),
        (["validate", "recipes/quickstart.yaml", "--set", "hybrid.w_recnt=4"], "did you mean w_recent"),
        (["validate", "recipes/quickstart.yaml", "--set", "hybrid.w_recent"], "="),
        (["runn", "recipes/quickstart.yaml"], "No such command"),
        (["show", "runs/never-made"], "no run"),
    ],
)
def test_mistakes_on_the_command_line_leave_with_2_and_a_reason(lt_train, arguments, reason):
    code, out, err = lt_train(*arguments)
    assert code == 2
    assert reason in err
    assert "Traceback" not in out + err


def test_a_variable_of_a_launcher_that_is_no_number_leaves_with_2_and_a_reason(lt_train, monkeypatch):
    monkeypatch.setenv("RANK", "")
    code, out, err = lt_train("--version")
    assert code == 2 and "error RANK: '': no whole number" in err and "Traceback" not in out + err


def test_the_help_lists_every_command_below_a_heading(lt_train):
    code, out, _ = lt_train("--help")
    assert code == 0 and "─ Commands ─" not in out and "probe" not in out
    headings = [out.index(f"─ {heading} ─") for heading in cli.COMMANDS]
    assert headings == sorted(headings)
    for name in ("init", "eval", "import-layers", "show", "serve", "bench"):
        assert out.index(f"│ {name} ") > headings[0]


def test_a_shell_completes_the_name_of_a_command():
    variables = {"_LT_TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "lt-train va", "COMP_CWORD": "1"}
    done = subprocess.run([Path(sys.executable).with_name("lt-train")], env=ENVIRONMENT | variables, capture_output=True, text=True)
    assert done.stdout.split() == ["validate"], done.stderr


def test_deepspeeds_own_argument_before_the_command_is_taken(lt_train):
    code, out, _ = lt_train("--local_rank=0", "validate", "recipes/quickstart.yaml")
    assert (code, "valid recipe" in out) == (0, True)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lt-train", "validate", "recipes/quickstart.yaml"])
    monkeypatch.setattr("lt_train.recipe.loading.load_recipe_and_remarks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "stopped by SIGTERM")])
@pytest.mark.parametrize(
    ("command", "resumes"),
    [
        (("run", "recipes/quickstart.yaml"), "; the same command resumes"),
        (("train", "recipes/quickstart.yaml"), "; the same command resumes"),
        (("compare", "recipes/quickstart.yaml"), "; the same command resumes"),
        (("validate", "recipes/quickstart.yaml"), ""),
        (("bench", "growth", "--shape", "135m"), ""),
    ],
    ids=lambda given: given[0] if given else "",
)
def test_a_command_that_a_signal_stops_reports_whether_the_same_command_resumes(
    lt_train, monkeypatch, command, resumes, number, code, line
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for reached in ("recipe.loading.load_recipe_and_remarks", "bench.growth.bench_growth", "pipeline.comparison.compare"):
        monkeypatch.setattr(f"lt_train.{reached}", lambda *_: signal.raise_signal(number))
    try:
        assert lt_train(*command) == (code, "", f"{line}{resumes}\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_is_reported_in_one_line_with_the_fix(lt_train, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/scores.json")

    monkeypatch.setattr("lt_train.recipe.loading.load_recipe_and_remarks", full)
    code, out, err = lt_train("validate", "recipes/quickstart.yaml")
    assert code == 2 and "Traceback" not in out + err
    assert "No space left on device: 'runs/mine/scores.json'" in err and "free some space" in err


def test_a_device_without_memory_is_reported_with_the_settings_that_need_less(lt_train, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 79.1 GiB")

    monkeypatch.setattr("lt_train.recipe.loading.load_recipe_and_remarks", too_large)
    code, out, err = lt_train("validate", "recipes/quickstart.yaml")
    assert code == 2 and "Traceback" not in out + err
    assert "CUDA out of memory. Tried to allocate 8.00 GiB. Fix: a smaller train.micro_batch_size" in err
    assert "docs/troubleshooting.md#out-of-memory" in err


def test_report_writes_the_page_that_is_requested(lt_train, tmp_path):
    runs = [made_run(tmp_path / "runs", name) for name in ("one", "two")]
    code, out, err = lt_train("report", *runs, "--out", tmp_path / "page.html")
    assert code == 0, err
    assert f"report: {tmp_path / 'page.html'}" in out.replace("\n", "")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!") and "one" in page and "two" in page
    code, out, err = lt_train("report", tmp_path / "nowhere")
    assert code == 2 and "no run" in err and "Traceback" not in out + err


def test_a_terminal_that_is_not_utf_8_shows_results_without_traceback_and_gets_the_same_json(tmp_path):
    def printed(*arguments: str, encoding: str) -> str:
        environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "lt_train", *arguments]
        done = subprocess.run(command, capture_output=True, encoding=encoding, env=environment, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        return done.stdout

    show = ("show", str(made_run(tmp_path, "tiny")))
    assert "± SE" in printed(*show, encoding="utf-8") and "? SE" in printed(*show, encoding="ascii")
    validate = ("validate", "quickstart", "--json", "--set", "prompt.system=Größe")
    recipe = json.loads(printed(*validate, encoding="ascii"))["recipe"]
    assert recipe["prompt"]["system"] == "Größe"


def test_only_training_runs_in_several_processes(lt_train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "leave", sys.exit)
    code, _, err = lt_train("run", "recipes/quickstart.yaml")
    assert (code, "only train and eval run under them" in err) == (2, True)


def test_results_and_recipes_are_printed_as_json_where_a_program_asks(lt_train, tmp_path):
    made_run(tmp_path, "tiny")
    code, out, _ = lt_train("show", tmp_path / "tiny", "--json")
    results = json.loads(out)
    assert (code, {result["variant"] for result in results}) == (0, {"base", "converted", "trained"})
    (base,) = [each for each in results if (each["variant"], each["evaluation"]) == ("base", "ledger")]
    assert base["scores"]["accuracy"] == 0.75 and base["scores"]["interval"]["low"] < 0.75 and base["kind"] == "answers"
    code, out, _ = lt_train("validate", "recipes/quickstart.yaml", "--json", "--set", "hybrid.w_recent=8")
    assert (code, json.loads(out)["recipe"]["hybrid"]["w_recent"]) == (0, 8)
