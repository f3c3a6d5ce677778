import errno
import os
import sys

import pytest

from lt_train import cli
from tests.support.families import BASES
from tests.support.made_runs import made_run

BROKEN = """
name: broken
model: {base: nowhere/at/all}
hybrid: {lazy_layer_ratio: 2, w_recnt: 4}
data: {source: missing.jsonl, format: still}
"""


@pytest.fixture
def lt_train(monkeypatch, capsys):
    """Run a command as the shell would; returns exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lt-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


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


def test_deepspeeds_own_argument_before_the_command_is_taken(lt_train):
    code, out, _ = lt_train("--local_rank=0", "validate", "recipes/quickstart.yaml")
    assert (code, "valid recipe" in out) == (0, True)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lt-train", "validate", "recipes/quickstart.yaml"])
    monkeypatch.setattr("lt_train.recipe.loading.load_recipe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_full_disk_is_said_in_one_line_with_the_way_on(lt_train, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/scores.json")

    monkeypatch.setattr("lt_train.recipe.loading.load_recipe", full)
    code, out, err = lt_train("validate", "recipes/quickstart.yaml")
    assert code == 2 and "Traceback" not in out + err
    assert "No space left on device: 'runs/mine/scores.json'" in err and "make room" in err


@pytest.fixture
def tiny_base(tmp_path):
    """A model of four layers, as a user names it on the command line."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


SIZES = ("--w-sink", 2, "--w-recent", 30)


def test_bench_decode_takes_lengths_shares_and_a_budget_from_the_command_line(lt_train, tiny_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--at", 300, "--at", 200, "--lazy-layer-ratio", 0.25, "--kv-budget", 1)
    code, out, err = lt_train("bench", "decode", tiny_base, *given, *SIZES)
    assert code == 0, err
    assert "KV budget 1 MiB for each, w_sink 2, w_recent 30" in out
    rows = [line.split()[:2] for line in out.splitlines() if "/4" in line]
    assert rows == [["300", "0/4"], ["300", "1/4"], ["200", "0/4"], ["200", "1/4"]]


def test_bench_growth_takes_lengths_from_the_command_line(lt_train, tiny_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = lt_train("bench", "growth", tiny_base, "--at", 64, "--at", 80, *SIZES)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:2] in ("64", "80")] == ["64", "80"]


def test_bench_batching_takes_answers_and_a_budget_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--answers", 6, "--longest", 32, "--kv-budget", 1)
    code, out, err = lt_train("bench", "batching", "data/tiny-reasoner", *given, *SIZES)
    assert code == 0, err
    assert "6 answers" in out and "1 MiB" in out


def test_bench_attention_takes_kernels_lengths_and_windows_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--kernel", "blocked", "--at", 64, "--at", 200, "--w-recent", 12, "--w-recent", 28, "--runs", 1)
    code, out, err = lt_train("bench", "attention", *given)
    assert code == 0, err
    rows = [line.split()[:3] for line in out.splitlines() if "blocked" in line]
    assert rows == [["64", "12", "blocked"], ["64", "28", "blocked"], ["200", "12", "blocked"], ["200", "28", "blocked"]]


@pytest.mark.parametrize("given", [("--kernel", "flash"), ("--kernel", "fast"), ("--at", 0), ("--w-recent", -3)])
def test_bench_attention_refuses_what_it_cannot_time(given, lt_train):
    code, out, err = lt_train("bench", "attention", *given)
    assert code == 2 and "Traceback" not in out + err
    assert str(given[1]) in err or given[0] in err


def test_bench_training_step_takes_method_and_length_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--method", "full", "--tokens", 40, "--no-checkpointing", "--runs", 1)
    code, out, err = lt_train("bench", "training-step", "data/tiny-reasoner", *given, *SIZES)
    assert code == 0, err
    assert "40 tokens a step, all weights, without gradient checkpointing" in out and "limit by operations" in out


@pytest.mark.parametrize("given", [("--tokens", 0), ("--lazy-layer-ratio", 3), ("--w-recent", 0), ("--method", "some")])
def test_bench_training_step_refuses_what_no_recipe_takes(given, lt_train):
    code, out, err = lt_train("bench", "training-step", "data/tiny-reasoner", *given)
    assert code == 2 and str(given[1]) in err and "Traceback" not in out + err


def test_a_budget_that_holds_no_sequence_is_refused_by_its_option(lt_train):
    code, out, err = lt_train("bench", "batching", "data/tiny-reasoner", "--kv-budget", 0)
    assert code == 2 and "--kv-budget" in err and "Traceback" not in out + err


def test_report_writes_the_page_that_is_asked_for(lt_train, tmp_path):
    runs = [made_run(tmp_path / "runs", name) for name in ("one", "two")]
    code, out, err = lt_train("report", *runs, "--out", tmp_path / "page.html")
    assert code == 0, err
    assert f"report: {tmp_path / 'page.html'}" in out.replace("\n", "")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!") and "one" in page and "two" in page
    code, out, err = lt_train("report", tmp_path / "nowhere")
    assert code == 2 and "no run" in err and "Traceback" not in out + err


def test_only_training_runs_in_several_processes(lt_train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "leave", sys.exit)
    code, _, err = lt_train("run", "recipes/quickstart.yaml")
    assert (code, "only train and eval run under them" in err) == (2, True)
