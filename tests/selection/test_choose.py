from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.hybrid.kv_size import KV_TOKENS, kv_bytes
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.choose import (
    choose_layers,
    choose_spec,
    explicit_heads,
    explicit_layers,
    number_below_rise,
    number_by_ratio,
    number_that_stream,
    number_within_kv_budget,
)
from tests.support.gates_profiles import HEADS, profile_of


@pytest.mark.parametrize("ratio", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_finite_number_is_refused(ratio) -> None:
    with pytest.raises(UserError, match=r"hybrid\.lazy_layer_ratio: (nan|inf): not a finite number\. Fix: set it above 0"):
        number_by_ratio(ratio, 8)


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
    assert choose_layers(Hybrid(layers=[3, 1]), HybridSpec(8, ()), seed=0) == (1, 3)
    assert choose_layers(Hybrid(lazy_layer_ratio=0.5, strategy="periodic"), HybridSpec(8, ()), seed=0) == (0, 2, 4, 6)


def test_random_layers_follow_from_the_seed_alone():
    hybrid = Hybrid(lazy_layer_ratio=0.5, strategy="random")
    drawn = [choose_layers(hybrid, HybridSpec(12, ()), seed=seed) for seed in range(30)]
    assert drawn == [choose_layers(hybrid, HybridSpec(12, ()), seed=seed) for seed in range(30)]
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


def by_head(**settings) -> Hybrid:
    return Hybrid(granularity="kv_head", **settings)


def test_the_kv_heads_with_the_smallest_shares_stream_and_ties_go_to_the_lower_layer_and_head():
    chosen = [
        choose_spec(by_head(lazy_layer_ratio=n / 6), HybridSpec(3, ()), 2, seed=0, profile=profile_of(HEADS))
        for n in (1, 2, 3, 4, 5)
    ]
    assert [spec.streaming_heads(kv_heads=2) for spec in chosen] == [
        [(1,), (), ()],
        [(1,), (), (1,)],
        [(1,), (0,), (1,)],
        [(1,), (0, 1), (1,)],
        [(1,), (0, 1), (0, 1)],
    ]
    assert (chosen[4].lazy_layers, chosen[4].split_layers, chosen[4].w_recent) == ((1, 2), ((0, (1,)),), 1020)


@given(st.floats(0.05, 0.95), st.integers(1, 4), st.integers(2, 12))
def test_a_kv_budget_is_met_by_as_few_heads_as_can(budget, kv_heads, num_layers):
    config = {"num_attention_heads": kv_heads, "hidden_size": 64 * kv_heads}

    def fraction(flat):
        heads = [[flat_head % kv_heads for flat_head in flat if flat_head // kv_heads == layer] for layer in range(num_layers)]
        spec = HybridSpec.from_streaming_heads(heads, kv_heads, 0, 1024)
        return kv_bytes(config, spec, KV_TOKENS, 2) / kv_bytes(config, spec.all_full, KV_TOKENS, 2)

    hybrid = by_head(kv_budget=budget, w_sink=0, w_recent=1024)
    try:
        count = number_that_stream(hybrid, HybridSpec(num_layers, ()), kv_heads)
    except UserError as error:
        assert "KV heads but one streaming" in str(error)
        assert fraction(range(num_layers * kv_heads - 1)) > budget - 1e-6
    else:
        assert fraction(range(count)) <= budget + 1e-6
        assert count == 1 or fraction(range(count - 1)) > budget - 1e-6


def test_heads_stream_while_their_shares_stay_below_the_rise_or_the_error_names_one_that_would_do():
    profile = profile_of(HEADS)
    assert number_that_stream(by_head(max_rise=0.15), HybridSpec(3, ()), 2, profile) == 3
    assert choose_spec(by_head(max_rise=0.25), HybridSpec(3, ()), 2, seed=0, profile=profile).split_layers == ((0, (1,)), (2, (1,)))
    dear = profile_of([[[0.9, 0.2], [0.3, 0.4]]])
    with pytest.raises(UserError, match=r"max_rise: 0\.1: the KV head that loses least .* share of 0\.2 nats\. .*at least 0\.2$"):
        number_that_stream(by_head(max_rise=0.1), HybridSpec(2, ()), 2, dear)
    assert number_that_stream(by_head(max_rise=0.2), HybridSpec(2, ()), 2, dear) == 1


def test_a_ratio_that_no_or_every_head_would_meet_is_refused_with_ratios_that_work():
    with pytest.raises(
        UserError, match=r"of 6 KV heads 6 would stream, every KV head\. Fix: set it from 0\.167 \(1 KV head\) to 0\.833"
    ):
        number_that_stream(by_head(lazy_layer_ratio=0.95), HybridSpec(3, ()), 2)


def test_heads_cannot_be_chosen_from_a_profile_without_their_shares():
    profile = profile_of(HEADS)
    without = replace(profile, fingerprint=replace(profile.fingerprint, strategies=("reach",)))
    with pytest.raises(
        UserError, match=r"granularity: kv_head: .* no shares of KV heads, only reach\. Fix: score the layers again with"
    ):
        choose_spec(by_head(lazy_layer_ratio=0.5), HybridSpec(3, ()), 2, seed=0, profile=without)


@pytest.mark.parametrize(
    ("heads", "fault"),
    [
        ([[], [1]], "2 lists, and this model has 3 layers"),
        ([[], [2], []], r"streaming_kv_heads\.1: KV head 2 is not in this model\. Fix: name heads from 0 to 1"),
        ([[], [], []], "nothing would stream"),
        ([[0, 1], [1, 0], [0, 1]], "every KV head would stream"),
    ],
)
def test_named_heads_that_the_model_has_not_or_that_are_none_or_all_are_refused(heads, fault):
    with pytest.raises(UserError, match=fault):
        explicit_heads(heads, num_layers=3, kv_heads=2)
    assert choose_spec(by_head(streaming_kv_heads=[[], [1, 0], [1]]), HybridSpec(3, ()), 2, seed=0).split_layers == ((2, (1,)),)
