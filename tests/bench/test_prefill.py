import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lt_train.bench import prefill
from lt_train.bench.base import StoredBase
from lt_train.bench.prefill import bench_prefill, prefill_operations, time_prefill
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.planning.compute import causal_pairs
from lt_train.recipe.schema import Model
from tests.support.families import BASES

TOKENS = 300


def test_the_operations_are_those_that_torch_counts() -> None:
    """Of its products; it counts attention over all pairs, of which a prompt has the causal ones."""
    model = build_hybrid(BASES["qwen3"], HybridSpec(4, (), 2, 30)).eval()
    with FlopCounterMode(display=False) as counted:
        time_prefill(model, TOKENS, chunk=TOKENS)
    by_operator = counted.get_flop_counts()["Global"]
    warm_up = prefill_operations(model, prefill.WARM_UP)
    products = sum(count for operator, count in by_operator.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    pairs = causal_pairs(TOKENS) + causal_pairs(prefill.WARM_UP)
    queries = model.config.num_attention_heads * model.config.head_dim
    assert prefill_operations(model, TOKENS) + warm_up == products + 4 * 4 * queries * pairs


def test_streaming_layers_multiply_for_their_window_alone() -> None:
    full, half = (build_hybrid(BASES["qwen3"], HybridSpec(4, layers, 2, 30)).eval() for layers in ((), (1, 2)))
    queries = full.config.num_attention_heads * full.config.head_dim
    left_out = sum(max(tokens - 32, 0) for tokens in range(1, TOKENS + 1))
    assert prefill_operations(full, TOKENS) - prefill_operations(half, TOKENS) == 2 * 4 * queries * left_out


def test_the_table_holds_hybrids_against_full_attention_and_the_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    monkeypatch.setattr(prefill, "product_rate", lambda rows, dtype: 1e15)
    console = Console(record=True, width=80)
    bench_prefill(StoredBase(Model(base=str(tmp_path), dtype="fp32")), [0.5, 0.75], 2, 30, [100, TOKENS], 64, console)
    out = console.export_text()
    rows = [line.split() for line in out.splitlines() if "/4" in line]
    assert [row[:2] for row in rows] == [[tokens, lazy] for tokens in ("100", "300") for lazy in ("0/4", "2/4", "3/4")]
    assert all(row[5:7] == ["0", "%"] for row in rows), "nothing reaches a petaflop"
    assert all(row[-1] == "%" for row in rows if row[1] != "0/4") and "in chunks of 64 tokens" in out
