from dataclasses import replace

import pytest
from rich.console import Console
from torch.nn import Linear
from transformers import AutoModelForCausalLM

from lt_train.bench import decode
from lt_train.bench.base import StoredBase
from lt_train.bench.decode import TIMED_STEPS, Throughput, bench_decode, gpu_table, throughput, throughput_table, weights_line
from lt_train.bench.roofline import Rates
from lt_train.bench.step_profile import PARTS, profile_table
from lt_train.bench.vllm_speed import VllmStep
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from tests.support.families import BASES

ENTRY = 2 * 2 * 16 * 4  # keys and values, heads, head size, fp32
SEQUENCE = ENTRY * (2 * 384 + 2 * 32)  # two full layers in pages of 128 tokens, two rings


@pytest.mark.parametrize(
    "spec",
    [HybridSpec(4, (0, 2), 2, 30), HybridSpec.from_streaming_heads([(0, 1), (1,), (0,), ()], 2, 2, 30)],
    ids=["half of the layers", "half of the KV heads"],
)
def test_the_budget_is_filled_with_sequences_and_the_bytes_of_a_step_are_counted(spec: HybridSpec) -> None:
    model = build_hybrid(BASES["qwen3"], spec).eval()
    found = throughput(model, context=300, budget=7 * SEQUENCE + SEQUENCE // 2)
    assert found.slots == 7
    assert found.kv_bytes == 7 * SEQUENCE
    assert found.moved_bytes == found.kv_bytes + sum(parameter.nbytes for parameter in model.parameters())
    assert found.tokens_per_second == pytest.approx(7000 / found.milliseconds)


def test_a_hybrid_gets_more_slots_from_the_same_budget_and_the_table_shows_it(tmp_path, capsys) -> None:
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    base = StoredBase(Model(base=str(tmp_path), dtype="fp32"))
    console = Console(record=True, width=160)
    tight = ENTRY * 4 * 640 * 3 + 1  # three full sequences of 600 tokens and what they still write
    bench_decode(base, [0.5, 0.75], 2, 30, [600 - TIMED_STEPS], tight, console)
    rows = [line.split() for line in console.export_text().splitlines() if "/4" in line]
    assert [(row[1], int(row[2])) for row in rows] == [("0/4", 3), ("2/4", 5), ("3/4", 10)]
    assert all(row[-1] == "%" for row in rows[1:])


def test_a_budget_below_one_sequence_is_refused() -> None:
    model = build_hybrid(BASES["qwen3"], HybridSpec(4, (), 2, 30)).eval()
    with pytest.raises(UserError, match=r"less than one sequence of 300 tokens\. Fix: set at least"):
        throughput(model, context=300, budget=1000)


def test_every_row_is_held_against_the_machines_roofline(tmp_path, monkeypatch) -> None:
    """A step cannot be faster than its bytes at the rate of a copy, nor than its operations at that of a product."""
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    monkeypatch.setattr(decode, "measure_rates", lambda dtype: Rates(bandwidth=2e6, products=1e12))
    console = Console(record=True, width=80)
    bench_decode(StoredBase(Model(base=str(tmp_path), dtype="fp32")), [0.5], 2, 30, [300], 2**20, console)
    out = console.export_text()
    rows = [line.split() for line in out.splitlines() if "/4" in line]
    weights = sum(m.weight.nbytes for m in build_hybrid(BASES["qwen3"], HybridSpec(4, (), 2, 30)).modules() if type(m) is Linear)
    for row, sequence in zip(rows, (ENTRY * 4 * 384, SEQUENCE), strict=True):
        slots, milliseconds, roof, share = int(row[2]), float(row[3]), float(row[4]), float(row[5])
        assert roof == pytest.approx(1000 * (weights + slots * sequence) / 2e6, abs=1)
        assert share == pytest.approx(100 * roof / max(milliseconds, 1), rel=0.5)
    assert "0.0 GB/s" in out and "1,000 GFLOP/s" in out


def test_the_roofline_of_many_rows_is_that_of_their_products() -> None:
    model = build_hybrid(BASES["qwen3"], HybridSpec(4, (), 2, 30))
    elements = sum(m.weight.numel() for m in model.modules() if type(m) is Linear)
    rates = Rates(bandwidth=1e12, products=1e6)
    assert rates.step_seconds(model, 50, kv_bytes=0) == pytest.approx(2 * 50 * elements / 1e6)
    grouped = BASES["qwen3"].num_attention_heads // BASES["qwen3"].num_key_value_heads
    attention = rates.step_seconds(model, 50, kv_bytes=4000) - rates.step_seconds(model, 50, kv_bytes=0)
    assert attention == pytest.approx(2 * grouped * 1000 / 1e6)


def test_every_table_fits_80_columns(tmp_path, monkeypatch) -> None:
    """As in a file, where a console has 80 columns: no title and no number is cut."""
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    console = Console(record=True, width=80)
    full = Throughput(1024, 0, 100, 123456.0, roofline_milliseconds=12345.0)
    console.print(
        throughput_table(128, [131072], {(): [full], (1,): [replace(full, slots=65536)]}, {131072: VllmStep(4096, 123456.0)})
    )
    console.print(profile_table(128, [(131072, 100, dict.fromkeys(PARTS, 12345.6))]))
    out = console.export_text()
    assert "…" not in out and max(map(len, out.splitlines())) <= 80


def test_what_does_not_pack_weights_reports_it(tmp_path, monkeypatch) -> None:
    assert weights_line([None, None]) == "weights: packed"
    assert weights_line([None, "one sequence gains nothing"]) == (
        "weights: as they are stored, or packed (one sequence gains nothing)"
    )
    assert weights_line(["no compiler"] * 2) == "weights: as they are stored (no compiler)"


def test_a_profile_divides_the_time_of_a_step_among_its_parts() -> None:
    model = build_hybrid(BASES["qwen3"], HybridSpec(4, (0, 2), w_sink=2, w_recent=30)).eval()
    found = throughput(model, context=300, budget=7 * SEQUENCE, profiled=True)
    assert found.parts is not None and list(found.parts) == list(PARTS)
    assert all(milliseconds > 0 for milliseconds in found.parts.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_profile_finds_products_where_the_weights_are_large() -> None:
    config = type(BASES["qwen3"])(**{**BASES["qwen3"].to_dict(), "intermediate_size": 32768})
    model = build_hybrid(config, HybridSpec(4, (), w_sink=2, w_recent=30)).eval()
    parts = throughput(model, context=8, budget=4 * 4 * 128 * ENTRY, profiled=True).parts
    assert parts is not None and parts["products"] > 2 * max(parts["attention"], parts["writes"], parts["sampling"])


def test_on_a_gpu_the_ratio_by_the_gpus_own_time_is_shown_too() -> None:
    """A step that waits for Python has another ratio than one that computes."""
    full, ours = Throughput(10, 0, 100, 50.0, gpu_milliseconds=20.0), Throughput(30, 0, 150, 60.0, gpu_milliseconds=24.0)
    console = Console(record=True, width=80)
    console.print(gpu_table(4, [8192], {(): [full], (1, 3): [ours]}))
    titles, *rows = (line.split() for line in console.export_text().splitlines() if line.strip() and "─" not in line)
    assert titles[-5:] == ["GPU", "ms", "faster", "by", "it"]
    assert rows[0][-1] == "20.0" and rows[1][-2:] == ["24.0", "2.50x"]
