"""The choice of layers and KV heads of a base in which some layers have a window from the start: only its full layers count."""

import json
from dataclasses import replace

import pytest
from transformers import Olmo3Config

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.kv_size import KV_TOKENS, kv_bytes
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.choose import choose_spec, explicit_heads, explicit_layers, number_that_stream
from lt_train.selection.curve import curve_figure
from lt_train.selection.fingerprint import Sizes, fingerprint
from lt_train.selection.picture import profile_figure
from lt_train.selection.profile import LayerProfile
from lt_train.selection.scoring import profile_layers
from tests.support.families import BASES as FAMILIES

BASE = HybridSpec(8, (), sliding_layers=(0, 1, 3, 4, 6), sliding_window=4096)
FULL = {2, 5, 7}


@pytest.fixture
def family():
    return "olmo3"


@pytest.fixture
def profile(hybrid_of, example_of, hybrid_part, tmp_path) -> LayerProfile:
    model, examples = hybrid_of(), [example_of(seed) for seed in range(3)]
    found = profile_layers(
        model, examples, hybrid_part, ("gates", "reach", "nll", "kl", "lazy_ratio"), out=tmp_path, progress=False
    )
    assert LayerProfile.load(tmp_path / "profile.json") == found
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["sliding_layers"] == [0]
    return found


def test_every_strategy_scores_the_full_layers_alone_and_chooses_among_them(profile):
    assert profile.sliding_layers == (0,)
    for strategy in profile.strategies:
        for score_L in profile.scores[strategy]:
            assert score_L[0] == 0 and all(score_L[1:])
        assert profile.choose(strategy, 3) == (1, 2, 3)
        assert profile.stability(strategy, 2).by_chance == pytest.approx(4 / 3)
    assert profile.choose("periodic", 2) == (1, 2)
    heads_L = profile.choose_heads(4)
    assert heads_L[0] == () and sum(map(len, heads_L)) == 4
    assert profile.choose_heads(6) == [(), (0, 1), (0, 1), (0, 1)]
    assert profile.predicted_rise(HybridSpec(4, (1, 2, 3)).on(HybridSpec(4, (), sliding_layers=(0,), sliding_window=9))) != 0


def test_the_pictures_show_which_layers_slid_from_the_start(profile):
    chosen = HybridSpec(4, (2,), 2, 6, sliding_layers=(0,), sliding_window=11)
    texts = [text.get_text() for text in profile_figure(profile, chosen).findobj(lambda artist: hasattr(artist, "get_text"))]
    assert "slides in the base" in texts and any("1 of 3 full layers" in text for text in texts)
    curve_figure(profile, chosen)


@pytest.mark.parametrize("strategy", ["periodic", "random"])
def test_ratios_are_of_the_layers_that_can_stream(strategy):
    spec = choose_spec(Hybrid(lazy_layer_ratio=0.7, strategy=strategy), BASE, 2, seed=3)
    assert len(spec.lazy_layers) == 2 and set(spec.lazy_layers) <= FULL
    assert (spec.sliding_layers, spec.sliding_window) == (BASE.sliding_layers, 4096)


def test_kv_heads_are_spread_over_the_full_layers():
    hybrid = Hybrid(lazy_layer_ratio=0.5, strategy="gates", granularity="kv_head")
    spec = choose_spec(hybrid, BASE, 2, seed=0)
    assert sum(map(len, spec.streaming_heads(2))) == 3 and set(spec.streaming_layers) <= FULL


@pytest.mark.parametrize("budget", [0.5, 0.62, 0.8])
def test_a_budget_counts_what_sliding_layers_cache(budget):
    hybrid = Hybrid(kv_budget=budget, lazy_layer_ratio=None, strategy="periodic")
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}

    def fraction(count: int) -> float:
        spec = replace(BASE, lazy_layers=tuple(sorted(FULL))[:count])
        return kv_bytes(config, spec, KV_TOKENS, 2) / kv_bytes(config, BASE, KV_TOKENS, 2)

    count = number_that_stream(hybrid, BASE, 2)
    assert fraction(count) <= budget < fraction(count - 1)


def test_a_sliding_layer_cannot_be_named():
    with pytest.raises(UserError, match=r"hybrid\.layers: layers 3, 4 with a window in the base already.* of \[2, 5, 7\]"):
        explicit_layers([4, 2, 3], 8, BASE.sliding_layers)
    with pytest.raises(UserError, match="every layer would stream"):
        explicit_layers([2, 5, 7], 8, BASE.sliding_layers)
    with pytest.raises(UserError, match=r"hybrid\.streaming_kv_heads: layer 0 with a window in the base already"):
        explicit_heads([[1], [], [0], [], [], [], [], []], 8, 2, BASE.sliding_layers)


def test_the_spec_of_a_base_is_read_from_its_config_or_from_that_of_a_hybrid_of_it():
    types = ["sliding_attention", "full_attention"]
    config = {"num_hidden_layers": 2, "layer_types": types, "sliding_window": 7}
    assert base_spec(config).sliding_layers == (0,)
    assert base_spec(config | {"hybrid_version": "4", "w_recent": 3}).sliding_window == 7
    assert (
        base_spec(config | {"hybrid_version": "1", "w_recent": None})
        == base_spec(config | {"hybrid_version": "1"})
        == HybridSpec(2, ())
    )
    assert base_spec({"num_hidden_layers": 2, "sliding_window": None}) == HybridSpec(2, ())


def test_the_key_of_a_profile_has_what_slides_in_the_base_and_not_what_streams():
    def key(base, **streaming):
        spec = replace(base_spec(base.to_dict(), 2, streaming.pop("w_recent", 6)), **streaming)
        return fingerprint(build_hybrid(base, spec), [], Sizes(2, 6, 8, 0.1), ["reach"]).config

    def changed(**settings):
        return Olmo3Config(**FAMILIES["olmo3"].to_dict() | settings)

    base = changed()
    same = [{"lazy_layers": (1,)}, {"lazy_layers": (1, 2)}, {"split_layers": ((2, (0,)),)}, {"w_recent": 7}]
    assert {key(base, **streaming) for streaming in same} == {key(base)}
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert len({key(each) for each in (base, changed(sliding_window=12), changed(layer_types=types))}) == 3
