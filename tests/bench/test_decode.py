import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from lt_train.bench.base import StoredBase
from lt_train.bench.decode import TIMED_STEPS, Throughput, bench_decode, throughput, throughput_table
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from tests.support.families import BASES

ENTRY = 2 * 2 * 16 * 4  # keys and values, heads, head size, fp32
SEQUENCE = ENTRY * (2 * 384 + 2 * 32)  # two full layers in pages of 128 tokens, two rings


def test_the_budget_is_filled_with_sequences_and_the_bytes_of_a_step_are_counted() -> None:
    model = build_hybrid(BASES["qwen3"], HybridSpec(4, (0, 2), w_sink=2, w_recent=30)).eval()
    found = throughput(model, context=300, budget=7 * SEQUENCE + SEQUENCE // 2)
    assert found.slots == 7
    assert found.kv_bytes == 7 * SEQUENCE
    assert found.moved_bytes == found.kv_bytes + sum(parameter.nbytes for parameter in model.parameters())
    assert found.tokens_per_second == pytest.approx(7000 / found.milliseconds)


def test_a_hybrid_gets_more_slots_from_the_same_budget_and_the_table_says_so(tmp_path, capsys) -> None:
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


def test_on_a_gpu_the_ratio_by_the_gpus_own_time_is_shown_too() -> None:
    """A step that waits for Python has another ratio than one that computes."""
    full, ours = Throughput(10, 0, 100, 50.0, gpu_milliseconds=20.0), Throughput(30, 0, 150, 60.0, gpu_milliseconds=24.0)
    console = Console(record=True, width=160)
    console.print(throughput_table(4, [8192], {(): [full], (1, 3): [ours]}))
    titles, *rows = (line.split() for line in console.export_text().splitlines() if line.strip() and "─" not in line)
    assert titles[-5:] == ["GPU", "ms", "faster", "by", "it"]
    assert rows[0][-1] == "20.0" and rows[1][-2:] == ["24.0", "2.50x"]
