import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from lt_train.bench import lazy_ratio
from lt_train.bench.base import StoredBase
from lt_train.bench.lazy_ratio import bench_lazy_ratio, time_ratios
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from tests.support.families import BASES


def test_the_ratio_of_every_layer_is_timed_in_every_pass_and_the_rest_is_the_forward_pass(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(lazy_ratio, "clock", lambda device: next(seconds))
    cost = time_ratios(build_hybrid(BASES["qwen3"], HybridSpec(4, (), 2, 30)).eval(), 100, w_last=8, runs=3)
    assert (cost.ratios, cost.forward) == (4, 5)  # each reading of the clock a second later than the one before
    assert cost.added == 0.8


def test_the_table_reports_what_the_ratios_add(tmp_path):
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    console = Console(record=True, width=80)
    bench_lazy_ratio(StoredBase(Model(base=str(tmp_path), dtype="fp32")), [100, 64], 8, 2, 30, 1, console)
    lines = console.export_text().splitlines()
    rows = [line.split() for line in lines if line.strip().startswith(("64", "100"))]
    assert [row[0] for row in rows] == ["64", "100"] and all(row[-1].endswith("%") for row in rows)


def test_a_prompt_within_the_window_is_refused():
    with pytest.raises(UserError, match=r"--at: 32: too small\. Fix: set at least 33"):
        bench_lazy_ratio(StoredBase(Model(base=".")), [32, 64], 8, 2, 30, 1, Console())
