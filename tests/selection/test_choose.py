import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.hybrid.kv_size import KV_TOKENS, kv_bytes
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.choose import (
    choose_layers,
    explicit_layers,
    number_below_rise,
    number_by_ratio,
    number_within_kv_budget,
)


@pytest.mark.parametrize(("ratio", "num_layers", "count"), [(0.5, 8, 4), (0.5, 7, 4), (0.35, 10, 4), (0.25, 30, 8), (0.73, 30, 22)])
def test_ratio_is_rounded_to_the_nearest_number_a_half_upwards(ratio, num_layers, count):
    assert number_by_ratio(ratio, num_layers) == count


@given(st.floats(0, 1), st.integers(1, 200))
def test_the_number_is_near_the_ratio_or_the_ratio_is_refused(ratio, num_layers):
    try:
        count = number_by_ratio(ratio, num_layers)
    except UserError:
        assert ratio * num_layers < 0.5 + 1e-9 or ratio * num_layers > num_layers - 0.5 - 1e-9
    else:
        assert 0 < count < num_layers
        assert abs(count - ratio * num_layers) <= 0.5 + 1e-9


@pytest.mark.parametrize(("ratio", "fault"), [(0.05, "no layer"), (0.95, "every layer")])
def test_no_layer_or_every_layer_is_refused_with_ratios_that_work(ratio, fault):
    with pytest.raises(UserError, match=rf"lazy_layer_ratio.*{ratio}.*{fault}.*0\.125 \(1 layer\) to 0\.875 \(7 layers\)"):
        number_by_ratio(ratio, 8)


@given(st.integers(2, 200))
def test_the_ratios_that_an_error_offers_work(num_layers):
    with pytest.raises(UserError) as refused:
        number_by_ratio(0.0, num_layers)
    words = str(refused.value).partition("Fix: ")[2].split()
    assert number_by_ratio(float(words[words.index("from") + 1]), num_layers) == 1
    assert number_by_ratio(float(words[words.index("to") + 1]), num_layers) == num_layers - 1


@given(st.floats(0.01, 0.99), st.integers(2, 80), st.integers(1, 9000))
def test_a_kv_budget_is_met_by_as_few_layers_as_can_or_refused_with_one_that_works(budget, num_layers, window):
    config = {"num_attention_heads": 1, "hidden_size": 64}

    def fraction(count):
        spec, full = (HybridSpec(num_layers, tuple(range(n)), 0, window) for n in (count, 0))
        return kv_bytes(config, spec, KV_TOKENS, 2) / kv_bytes(config, full, KV_TOKENS, 2)

    try:
        count = number_within_kv_budget(budget, num_layers, window)
    except UserError as error:
        assert fraction(num_layers - 1) > budget - 1e-6
        offered = float(str(error).partition("at least ")[2].partition(",")[0])
        assert fraction(number_within_kv_budget(min(offered, 0.999), num_layers, window)) <= offered + 1e-6
    else:
        assert fraction(count) <= budget + 1e-6
        assert count == 1 or fraction(count - 1) > budget - 1e-6


def test_layers_stream_while_their_shares_stay_below_the_rise():
    shares = [0.4, -0.1, 0.3, 0.05]
    assert [number_below_rise(rise, shares) for rise in (0.01, 0.2, 0.25, 0.6, 9.0)] == [2, 2, 3, 3, 3]
    with pytest.raises(
        UserError, match=r"hybrid\.max_rise: 0\.01: the layer that loses least .* share of 0\.0496 nats\. .*least 0\.05$"
    ):
        number_below_rise(0.01, [0.4, 0.0496])
    assert number_below_rise(0.05, [0.4, 0.0496]) == 1


def test_layers_that_need_no_scores_are_chosen_without_a_profile():
    assert choose_layers(Hybrid(layers=[3, 1]), num_layers=8, seed=0) == (1, 3)
    assert choose_layers(Hybrid(lazy_layer_ratio=0.5, strategy="periodic"), num_layers=8, seed=0) == (0, 2, 4, 6)


def test_random_layers_follow_from_the_seed_alone():
    hybrid = Hybrid(lazy_layer_ratio=0.5, strategy="random")
    drawn = [choose_layers(hybrid, num_layers=12, seed=seed) for seed in range(30)]
    assert drawn == [choose_layers(hybrid, num_layers=12, seed=seed) for seed in range(30)]
    assert all(len(set(layers)) == 6 and list(layers) == sorted(layers) for layers in drawn)
    assert len(set(drawn)) > 20
    assert {layer for layers in drawn for layer in layers} == set(range(12))


def test_explicit_layers_are_put_in_order():
    assert explicit_layers([5, 0, 3], 8) == (0, 3, 5)


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ([], "nothing would stream"),
        ([2, 8, 11], r"layers 8, 11 not in this model.*0 to 7"),
        ([-1, 2], "layer -1 not in this model"),
        ([3, 2, 3], "layer 3 named more than once"),
        (list(range(8)), "every layer would stream"),
    ],
)
def test_invalid_explicit_layers_are_refused(layers, fault):
    with pytest.raises(UserError, match=rf"hybrid\.layers: .*{fault}"):
        explicit_layers(layers, 8)
