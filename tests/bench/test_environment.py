"""`lt-train env`: what a bug report says about a machine."""

import json
from importlib.metadata import version

import pytest
import torch

from lt_train.hybrid.attention_kernels import KERNELS

LINES = ("python", "packages", "device", "memory", "disk", "dtype", "decoding", "attention")


def test_every_line_is_printed_and_fits_80_columns_where_it_is_a_table(lt_train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = lt_train("env")
    assert code == 0
    assert all(f"\n{line}" in f"\n{out}" for line in LINES)
    assert max(map(len, out[out.index("attention") :].splitlines())) <= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what works on a CPU")
def test_each_kernel_works_or_reports_why_not(lt_train):
    _, out, _ = lt_train("env", "--json")
    kernels = {kernel["name"]: kernel for kernel in json.loads(out)["kernels"]}
    assert kernels.keys() == KERNELS.keys()
    assert {name for name, kernel in kernels.items() if kernel["works"]} == {"reference", "blocked"}
    assert [name for name, kernel in kernels.items() if kernel["chosen"]] == ["blocked"]
    assert "needs an NVIDIA GPU" in kernels["flash"]["obstacle"]


def test_no_secret_is_printed(lt_train, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "hidden-value")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, out, _ = lt_train("env")
    assert "hidden-value" not in out and "HF_HUB_OFFLINE=1" in out


def test_what_is_not_installed_is_reported(lt_train, monkeypatch):
    monkeypatch.setattr("lt_train.bench.environment.PACKAGES", ("torch", "no-such-package"))
    found = json.loads(lt_train("env", "--json")[1])
    assert found["packages"] == {"torch": version("torch"), "no-such-package": None}
