import json
import subprocess
import sys

import pytest

from tests.support.families import BASES


def test_help_loads_no_heavy_library():
    program = "import sys; from lt_train.cli import app; app(['bench', '--help'], standalone_mode=False); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "training-step" in shown
    assert not {"torch", "transformers", "numpy"} & set(shown.splitlines()[-1].split())


@pytest.fixture
def tiny_base(tmp_path):
    """A model of four layers, as a user names it on the command line."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


SIZES = ("--w-sink", 2, "--w-recent", 30)


def test_decode_takes_lengths_fractions_and_a_budget_from_the_command_line(lt_train, tiny_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--at", 300, "--at", 200, "--lazy-layer-ratio", 0.25, "--kv-budget", 1)
    code, out, err = lt_train("bench", "decode", tiny_base, *given, *SIZES)
    assert code == 0, err
    assert "KV budget 1 MiB for each, w_sink 2, w_recent 30" in out
    rows = [line.split()[:2] for line in out.splitlines() if "/4" in line]
    assert rows == [["300", "0/4"], ["300", "1/4"], ["200", "0/4"], ["200", "1/4"]]


def test_decode_prints_a_profile_and_vllms_speed_on_request(lt_train, tiny_base, tmp_path):
    order = tmp_path / "order.json"
    python = tmp_path / "python"  # an environment whose vLLM holds two sequences, and takes a quarter of a second for each step
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit\ncp "$3" {order}\necho "[[2, 0.25], [2, 0.25]]" > "$4"\n')
    python.chmod(0o755)
    given = ("--at", 300, "--at", 200, "--lazy-layer-ratio", 0.25, "--kv-budget", 1, "--profile", "--against", "vllm", python)
    code, out, err = lt_train("bench", "decode", tiny_base, *given, *SIZES)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if "vLLM " in line and "/" not in line and "faster:" not in line]
    slots = [int(line.split()[2]) for line in [line for line in out.splitlines() if "0/4" in line][:2]]
    assert [row[:5] for row in rows] == [
        ["300", "vLLM", "2", "250", "8.0"],
        ["200", "vLLM", "2", "250", "8.0"],
    ]
    requested = json.loads(order.read_text())
    assert requested["model"] == str(tiny_base) and requested["kv_bytes"] == 2**20 and requested["dtype"] == "float32"
    assert [(len(prompts), len(prompts[0])) for prompts in requested["prompts"]] == [(slots[0], 300), (slots[1], 200)]
    assert "products" in out and "sampling" in out


def test_decode_refuses_what_it_cannot_compare_with(lt_train, tiny_base, tmp_path):
    fails = tmp_path / "python"
    fails.write_text('#!/bin/sh\n[ "$1" = -c ] && exit\necho "no module for this CPU"\nexit 3\n')
    fails.chmod(0o755)
    small = tmp_path / "small"
    small.write_text('#!/bin/sh\n[ "$1" = -c ] && exit\necho "[[0, 0.0]]" > "$4"\n')
    small.chmod(0o755)
    short = ("--at", 40, "--lazy-layer-ratio", 0.25, "--kv-budget", 1)
    for given, message in (
        ((tiny_base, "--against", "sglang", fails), "--against: sglang: it is not compared with"),
        (("--shape", tiny_base, "--against", "vllm", fails), "random weights are in none"),
        (
            (tiny_base, "--against", "vllm", small, "--at", 8176),
            "--at: 8,176: with its new tokens beyond the model's context of 8,192",
        ),
        ((tiny_base, "--against", "vllm", tmp_path / "none"), "not a python that runs"),
        ((tiny_base, "--against", "vllm", fails), "ended with code 3 and no result. Fix its error:\nno module for this CPU"),
        ((tiny_base, "--against", "vllm", small), "--kv-budget: 1 MiB: vLLM holds no sequence of 40 tokens in it. Fix: set more"),
    ):
        code, _, err = lt_train("bench", "decode", *given, *short, *SIZES)
        assert code == 2 and message in err and "Traceback" not in err


def test_growth_takes_lengths_from_the_command_line(lt_train, tiny_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = lt_train("bench", "growth", tiny_base, "--at", 64, "--at", 80, *SIZES)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:2] in ("64", "80")] == ["64", "80"]


def test_prefill_takes_lengths_and_a_chunk_from_the_command_line(lt_train, tiny_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = ("--at", 60, "--at", 90, "--lazy-layer-ratio", 0.5, "--chunk", 32)
    code, out, err = lt_train("bench", "prefill", tiny_base, *given, *SIZES)
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines() if "/4" in line] == [
        ["60", "0/4"], ["60", "2/4"], ["90", "0/4"], ["90", "2/4"],
    ]  # fmt: skip
    code, _, err = lt_train("bench", "prefill", tiny_base, "--at", 0)
    assert code == 2 and "--at" in err and "Traceback" not in err


def test_batching_takes_answers_and_a_budget_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--answers", 6, "--longest", 32, "--kv-budget", 1)
    code, out, err = lt_train("bench", "batching", "data/tiny-reasoner", *given, *SIZES)
    assert code == 0, err
    assert "6 answers" in out and "1 MiB" in out


def test_attention_takes_kernels_lengths_and_windows_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--kernel", "blocked", "--at", 64, "--at", 200, "--w-recent", 12, "--w-recent", 28, "--runs", 1)
    code, out, err = lt_train("bench", "attention", *given)
    assert code == 0, err
    rows = [line.split()[:3] for line in out.splitlines() if "blocked" in line]
    assert rows == [["64", "12", "blocked"], ["64", "28", "blocked"], ["200", "12", "blocked"], ["200", "28", "blocked"]]


@pytest.mark.parametrize("given", [("--kernel", "flash"), ("--kernel", "fast"), ("--at", 0), ("--w-recent", -3)])
def test_attention_refuses_what_it_cannot_time(given, lt_train):
    code, out, err = lt_train("bench", "attention", *given)
    assert code == 2 and "Traceback" not in out + err
    assert str(given[1]) in err or given[0] in err


def test_training_step_takes_method_and_length_from_the_command_line(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ("--method", "full", "--tokens", 40, "--no-checkpointing", "--runs", 1)
    code, out, err = lt_train("bench", "training-step", "data/tiny-reasoner", *given, *SIZES)
    assert code == 0, err
    assert "40 tokens a step, all weights, without gradient checkpointing" in out and "limit by operations" in out


@pytest.mark.parametrize("given", [("--tokens", 0), ("--lazy-layer-ratio", 3), ("--w-recent", 0), ("--method", "some")])
def test_training_step_refuses_what_no_recipe_takes(given, lt_train):
    code, out, err = lt_train("bench", "training-step", "data/tiny-reasoner", *given)
    assert code == 2 and str(given[1]) in err and "Traceback" not in out + err


@pytest.mark.parametrize("given", [("--kv-budget", -1), ("--kv-budget", 0), ("--at", 0), ("--lazy-layer-ratio", "nan")])
def test_decode_refuses_what_it_cannot_time(given, lt_train):
    code, out, err = lt_train("bench", "decode", "data/tiny-reasoner", *given)
    assert code == 2 and given[0].replace("--lazy-layer-ratio", "lazy_layer_ratio: nan") in err and "Traceback" not in out + err


def test_a_budget_that_holds_no_sequence_is_refused_by_its_option(lt_train):
    code, out, err = lt_train("bench", "batching", "data/tiny-reasoner", "--kv-budget", 0)
    assert code == 2 and "--kv-budget" in err and "Traceback" not in out + err
