import pytest
from rich.console import Console

from lt_train.bench.base import StoredBase
from lt_train.bench.batching import PROMPT_TOKENS, bench_batching, mixed_lengths
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError

TINY = StoredBase(Model(base="data/tiny-reasoner", dtype="fp32"))


def test_lengths_are_spread_from_a_sixteenth_to_the_longest_and_always_the_same() -> None:
    work = mixed_lengths(200, longest=160, vocab_size=50)
    lengths = sorted(request.max_new_tokens for request in work.requests)
    assert 10 <= lengths[0] < 14 and 140 < lengths[-1] <= 160
    assert 35 < lengths[100] < 46  # the middle of their logarithms: 40
    assert work == mixed_lengths(200, longest=160, vocab_size=50)
    assert work.longest == PROMPT_TOKENS + lengths[-1] and work.tokens == sum(lengths)


def test_both_ways_give_every_answer_its_length_and_the_rates_are_set_side_by_side() -> None:
    console = Console(record=True, width=160)
    bench_batching(TINY, 0.5, 4, 12, count=12, longest=48, budget=2**20, console=console)
    printed = console.export_text()
    assert "4 of 8 layers stream" in printed and "12 answers" in printed
    assert printed.splitlines()[-1].startswith("faster by")


def test_a_budget_below_one_answer_is_refused() -> None:
    with pytest.raises(UserError, match="--kv-budget"):
        bench_batching(TINY, 0.5, 4, 12, count=4, longest=48, budget=1000, console=Console())
