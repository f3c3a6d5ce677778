from itertools import pairwise

import numpy as np
import pytest
from matplotlib.image import imread

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.drawing import note_of
from lt_train.selection.curve import curve_figure, draw_curve, predicted_curve
from tests.support.gates_profiles import HEADS, profile_of


def test_the_curve_goes_from_full_attention_to_every_layer_streaming_by_the_smallest_shares():
    curve = predicted_curve(profile_of(HEADS).mean_shares, window=1024)
    kept = 1 / 32
    assert [rise for _, rise in curve] == pytest.approx([0, 0.2, 0.6, 1.4])
    assert [fraction for fraction, _ in curve] == pytest.approx([1, (2 + kept) / 3, (1 + 2 * kept) / 3, kept])


@pytest.mark.parametrize("seed", range(5))
def test_heads_never_lose_more_than_layers_at_equal_kv_bytes(seed):
    head_LG = np.random.default_rng(seed).random((6, 4))
    layers = dict(predicted_curve(head_LG.sum(axis=1).tolist(), 1024))
    heads = dict(predicted_curve(head_LG.flatten().tolist(), 1024))
    for fraction, rise in layers.items():
        (at_equal_bytes,) = [lost for kept, lost in heads.items() if abs(kept - fraction) < 1e-9]
        assert at_equal_bytes <= rise + 1e-9
    assert all(before <= after for before, after in pairwise(heads.values()))


def test_the_predicted_rise_of_a_choice_is_the_sum_of_its_shares():
    assert profile_of(HEADS).predicted_rise(HybridSpec(3, (0, 1))) == pytest.approx(1.0)
    split = HybridSpec.from_streaming_heads([(1,), (0, 1), (0,)], kv_heads=2, w_sink=4, w_recent=1020)
    assert profile_of(HEADS).predicted_rise(split) == pytest.approx(0.0 + 0.2 + 0.4)


def test_the_picture_marks_the_choice_on_both_lines_and_the_measured_rise_of_all(tmp_path):
    profile = profile_of(HEADS)
    chosen = HybridSpec(3, (1, 2), 4, 1020)
    (axes,) = curve_figure(profile, chosen).axes
    layers, heads, point, measured = axes.lines[:4]
    assert len(layers.get_xdata()) == 4 and len(heads.get_xdata()) == 7
    assert note_of(point) == "this run: 2 of 3 layers stream: 35.4% of the KV cache, predicted rise 0.6 nats"
    assert point.get_xdata()[0] in layers.get_xdata() and point.get_ydata()[0] == pytest.approx(layers.get_ydata()[2])
    assert note_of(measured) == "every layer streams: 3.1% of the KV cache, measured rise 1.5 nats"
    draw_curve(profile, chosen, tmp_path / "profile/curve.png")
    assert imread(tmp_path / "profile/curve.png").shape[1] > 1000


def test_a_choice_of_heads_is_marked_on_the_line_of_heads():
    profile = profile_of(HEADS)
    chosen = HybridSpec.from_streaming_heads(profile.choose_heads(4), kv_heads=2, w_sink=4, w_recent=1020)
    (axes,) = curve_figure(profile, chosen).axes
    _, heads, point, _ = axes.lines[:4]
    assert note_of(point).startswith("this run: 4 of 6 KV heads stream in 3 layers: 35.4% of the KV cache, predicted rise 0.2 nats")
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((heads.get_xdata()[4], heads.get_ydata()[4]))
