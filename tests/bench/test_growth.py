import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from lt_train.bench.base import StoredBase
from lt_train.bench.growth import TIMED_TOKENS, bench_growth, time_decoding
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from tests.support.families import BASES


@pytest.mark.parametrize(
    "spec",
    [HybridSpec(4, (0, 2), 2, 30), HybridSpec.from_streaming_heads([(0, 1), (1,), (0,), ()], 2, 2, 30)],
    ids=["half of the layers", "half of the KV heads"],
)
def test_times_are_taken_at_the_lengths_requested_with_what_the_cache_holds(spec):
    model = build_hybrid(BASES["qwen3"], spec).eval()
    timings = time_decoding(model, [64, 100], progress=False)
    per_entry = 2 * 2 * 16 * 4  # keys and values, heads, head size, fp32
    assert [timing.tokens for timing in timings] == [64, 100]
    assert [timing.kv_bytes for timing in timings] == [per_entry * (2 * 64 + 2 * 32), per_entry * (2 * 100 + 2 * 32)]
    assert {timing.ring_tokens for timing in timings} == {32}
    assert all(timing.milliseconds > 0 for timing in timings)


def test_the_table_sets_hybrid_and_full_attention_side_by_side(tmp_path):
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(tmp_path)
    console = Console(record=True, width=160)
    bench_growth(StoredBase(Model(base=str(tmp_path), dtype="fp32")), 0.5, 2, 30, [64, 128], console)
    printed = console.export_text()
    assert "2 of 4 layers stream" in printed
    assert "128" in printed and "limit" in printed


def test_a_length_shorter_than_what_is_timed_is_refused():
    with pytest.raises(UserError, match=str(TIMED_TOKENS)):
        bench_growth(StoredBase(Model(base=".")), 0.5, 2, 30, [8], Console())
