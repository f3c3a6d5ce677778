import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lt_train.bench.base import RandomBase, StoredBase
from lt_train.bench.decode import TIMED_STEPS, bench_decode
from lt_train.bench.roofline import Rates
from lt_train.bench.speculation import DraftRounds, Rounds, RoundTimes, measured_acceptance, pass_limit, time_rounds
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from tests.support.families import BASES
from tests.support.tiny_engine import letter_tokenizer, tiny_model

SPEC = HybridSpec(4, (0, 2), w_sink=2, w_recent=30)
HEADS = HybridSpec.from_streaming_heads([(0, 1), (1,), (0,), ()], kv_heads=2, w_sink=2, w_recent=30)
TOKEN = 2 * 2 * 16 * 4  # keys and values, heads, head size, fp32


def test_tokens_and_limit_of_a_round_follow_from_acceptance_and_times() -> None:
    times = RoundTimes(slots=10, drafting=0.1, verifying=0.6)
    found = Rounds(8192, SPEC, times, length=2, acceptance=0.5, limit=0.7, plain_limit=0.02, plain_rate=20.0)
    assert found.tokens == pytest.approx(10 * 1.75)
    assert found.tokens_per_second == pytest.approx(17.5 / 0.8)
    assert found.faster == pytest.approx(17.5 / 0.8 / 20)
    assert found.allowed == pytest.approx(17.5 / 0.7 * 0.02)


half_streams = pytest.mark.parametrize("spec", [SPEC, HEADS], ids=["half of the layers", "half of the KV heads"])


@half_streams
def test_a_pass_takes_what_its_bytes_or_its_operations_take(spec: HybridSpec) -> None:
    model = build_hybrid(BASES["qwen3"], spec)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    kv = 3 * TOKEN * (2 * 500 + 2 * 32)
    by_bytes = pass_limit(Rates(bandwidth=1e9, products=1e15), model, spec, 500, slots=3, tokens=5)
    assert by_bytes == pytest.approx((4 * weights + kv) / 1e9)
    by_operations = pass_limit(Rates(bandwidth=1e15, products=1e9), model, spec, 500, slots=3, tokens=5)
    grouped = model.config.num_attention_heads // model.config.num_key_value_heads
    assert by_operations == pytest.approx((2 * 15 * weights + 2 * 5 * grouped * kv / 4) / 1e9)


@half_streams
def test_the_budget_holds_the_drafts_rings(spec: HybridSpec) -> None:
    model = build_hybrid(BASES["qwen3"], spec).eval()
    draft = Draft.of(spec, None, 4)
    sequence = TOKEN * (2 * 384 + 4 * 36)  # two full layers in pages of 128 tokens, four rings with four drafted tokens
    assert time_rounds(model, draft, 300, 3 * sequence + sequence // 2).slots == 3
    with pytest.raises(UserError, match=r"--kv-budget: .* and the rings of its draft\. Fix: set at least 1 MiB"):
        time_rounds(model, draft, 300, sequence - 1)


def test_a_draft_longer_than_the_window_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(UserError, match=r"--draft: 30: not within the window of 30 tokens\. Fix: set it to at most 29"):
        DraftRounds(30, None, w_recent=30)


def test_the_acceptance_is_that_of_tokens_beyond_the_window() -> None:
    """Within it the draft is the model, and would be right every time."""
    model = tiny_model(HybridSpec(3, (), 2, 6))
    found = measured_acceptance(model, letter_tokenizer(), Draft.of(model.spec, None, 3))
    assert 0 < found < 0.9


@pytest.mark.parametrize("stored", [True, False], ids=["weights", "a shape"])
def test_the_table_fits_eighty_columns_and_reports_where_the_acceptance_comes_from(tmp_path, stored: bool) -> None:
    config = BASES["qwen3"]
    if stored:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        letter_tokenizer().save_pretrained(tmp_path)
    base = StoredBase(Model(base=str(tmp_path), dtype="fp32")) if stored else RandomBase("tiny", config, "fp32")
    console = Console(record=True, width=80)
    drafts = DraftRounds(3, None, w_recent=30)
    bench_decode(base, [0.5], 2, 30, [200, 600 - TIMED_STEPS], TOKEN * 4 * 640 * 30, console, drafts)
    text = console.export_text()
    _, _, table = text.partition("speculative decoding")
    rows = [line.split() for line in table.splitlines() if "/4" in line]
    assert [(row[0], row[1]) for row in rows] == [("200", "0/4"), ("200", "2/4"), ("584", "0/4"), ("584", "2/4")]
    assert all(row[-1] == "%" and len(row) == 12 for row in rows) and "…" not in table
    source = "of what the model samples after a window of made text" if stored else "assumed, as the weights are random"
    assert source in table


def test_layers_are_counted_of_those_that_can_stream() -> None:
    spec = HybridSpec(4, (1,), 2, 30, sliding_layers=(0, 2), sliding_window=9)
    drafts = DraftRounds(3, 0.5, w_recent=30)
    drafts.rates = Rates(bandwidth=1e9, products=1e9)
    drafts.found = [Rounds(200, spec, RoundTimes(1, 0.1, 0.6), 3, 0.5, limit=0.7, plain_limit=0.2, plain_rate=1.0)]
    console = Console(record=True, width=80)
    drafts.print(console)
    text = console.export_text()
    assert " 1/2 " in text and "all full layers stream in the draft" in text
