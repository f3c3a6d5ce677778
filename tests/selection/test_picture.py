import io
import itertools

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.image import imread

from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.drawing import COLOURS, WIDTH, note_of, to_svg
from lt_train.selection.fingerprint import Fingerprint, Sizes
from lt_train.selection.picture import draw_profile, profile_figure
from lt_train.selection.profile import LayerProfile, SampleScores
from tests.support.gates_profiles import HEADS
from tests.support.gates_profiles import profile_of as profile_by_gates


def profile_of(num_layers: int, strategies: tuple[str, ...]) -> LayerProfile:
    random = np.random.default_rng(0)
    samples = tuple(
        SampleScores(
            id=str(index),
            tokens=100,
            scores={strategy: tuple(random.random(num_layers).tolist()) for strategy in strategies},
            all_streaming=dict.fromkeys(strategies, 2.7),
        )
        for index in range(6)
    )
    made_from = Fingerprint(
        model="models/tiny",
        config="",
        weights="",
        dtype="float32",
        data="",
        sizes=Sizes(4, 1020, 64, 0.1),
        strategies=strategies,
        versions={},
    )
    return LayerProfile(made_from, num_layers, samples, (), "")


@pytest.mark.parametrize(("num_layers", "strategies"), [(2, ("nll",)), (64, ("reach", "nll", "lazy_ratio"))])
def test_a_picture_is_a_png_with_room_for_every_layer(tmp_path, num_layers, strategies):
    path = tmp_path / "profile" / "profile.png"
    draw_profile(profile_of(num_layers, strategies), HybridSpec(num_layers, (0,)), path)
    height, width, _ = imread(io.BytesIO(path.read_bytes()), format="png").shape
    assert width >= max(1000, 25 * num_layers)
    assert height >= 350 * len(strategies)
    assert [file.name for file in path.parent.iterdir()] == ["profile.png"]


def test_the_layers_chosen_are_marked(tmp_path):
    profile = profile_of(8, ("nll",))
    pictures = []
    for chosen in ((0, 1), (6, 7)):
        draw_profile(profile, HybridSpec(8, chosen), tmp_path / "profile.png")
        pictures.append((tmp_path / "profile.png").read_bytes())
    assert pictures[0] != pictures[1]


def colours(found: list) -> list[str]:
    return [to_hex(colour) for colour in found]


def grounds(axes: Axes) -> list[str]:
    return colours([patch.get_facecolor() for patch in axes.patches])


def test_points_are_means_and_bars_interquartile_ranges():
    profile = profile_of(8, ("reach", "lazy_ratio"))
    _, *panels = profile_figure(profile, HybridSpec(8, (0, 3))).axes
    for axes, strategy in zip(panels, profile.strategies, strict=True):
        scores_SL = np.array(profile.scores[strategy])
        ranges, points, *stems = axes.collections
        assert np.asarray(points.get_offsets()) == pytest.approx(np.stack([np.arange(8), scores_SL.mean(axis=0)], axis=1))
        drawn = np.array([segment[:, 1] for segment in ranges.get_segments()])
        assert drawn == pytest.approx(np.quantile(scores_SL, [0.25, 0.75], axis=0).T)
        assert bool(stems) == (strategy == "reach")  # a rise is measured from 0
        low, high = axes.get_ylim()
        assert low <= drawn.min() and drawn.max() <= high


def test_colours_show_what_streams_and_grounds_what_each_strategy_would_choose():
    profile = profile_of(8, ("reach", "nll", "lazy_ratio"))
    strip, *panels = profile_figure(profile, HybridSpec(8, (0, 3))).axes
    streams = [COLOURS["trained" if layer in (0, 3) else "base"] for layer in range(8)]
    assert colours([bar.get_facecolor() for bar in strip.patches]) == streams
    for axes, strategy in zip(panels, profile.strategies, strict=True):
        assert colours(axes.collections[1].get_facecolor()) == streams
        by_this = profile.choose(strategy, 2)
        assert grounds(axes) == [COLOURS["tint" if layer in by_this else "card"] for layer in range(8)]


def test_every_layer_has_a_tooltip_in_every_panel():
    profile = profile_of(3, ("nll",))
    strip, axes = profile_figure(profile, HybridSpec(3, (1,))).axes
    assert [note_of(bar) for bar in strip.patches] == [
        "layer 0 keeps full attention", "layer 1 streams", "layer 2 keeps full attention"
    ]  # fmt: skip
    for layer, ground in enumerate(axes.patches):
        text = note_of(ground)
        assert text.startswith(f"layer {layer}: {np.mean([scores[layer] for scores in profile.scores['nll']]):.4g} (")
        assert text.endswith("streams in this run" if layer == 1 else "keeps full attention in this run")


@pytest.mark.parametrize("num_layers", [2, 8, 32, 80])
def test_texts_can_be_read_on_a_phone_and_layers_have_labels_that_do_not_touch(num_layers):
    figure = profile_figure(profile_of(num_layers, ("reach", "nll", "lazy_ratio")), HybridSpec(num_layers, (0,)))
    to_svg(figure, "layer profile")
    assert figure.bbox.width == WIDTH
    drawn = [text for text in figure.findobj(type(figure.axes[0].title)) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in drawn) * 376 / WIDTH >= 9  # a card on a page of 400 pixels
    last = figure.axes[-1]
    low, high = last.get_xlim()
    ticks = zip(last.get_xticklabels(), last.get_xticks(), strict=True)
    boxes = [label.get_window_extent() for label, at in ticks if low <= at <= high]
    assert len(boxes) >= 2 and all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    for axes in figure.axes:
        assert axes.title.get_window_extent().x1 <= WIDTH and axes._left_title.get_window_extent().x1 <= WIDTH


def test_a_model_of_a_long_name_leaves_the_figure_its_width():
    profile = profile_of(2, ("nll",))
    long = profile.fingerprint.__class__(**{**vars(profile.fingerprint), "model": "models/" + "a-long-name" * 20})
    figure = profile_figure(LayerProfile(long, 2, profile.samples, (), ""), HybridSpec(2, (0,)))
    to_svg(figure, "layer profile")
    assert figure.axes[0]._left_title.get_window_extent().x1 <= WIDTH
    assert figure.axes[1].bbox.width > 300


def test_where_layers_are_split_the_strip_has_a_row_for_each_kv_head():
    chosen = HybridSpec.from_streaming_heads([(1,), (0, 1), ()], kv_heads=2, w_sink=4, w_recent=1020)
    strip, axes = profile_figure(profile_by_gates(HEADS), chosen).axes
    assert strip.get_title(loc="left").startswith("tiny: 3 of 6 KV heads stream in 2 layers")
    full, streams = COLOURS["base"], COLOURS["trained"]
    assert colours([bar.get_facecolor() for bar in strip.patches]) == [full, streams, full, streams, streams, full]
    assert note_of(strip.patches[3]) == "layer 0, KV head 1 streams"
    assert colours(axes.collections[1].get_facecolor()) == [COLOURS["converted"], streams, full]
    assert note_of(axes.patches[0]).endswith("streams in KV head 1 in this run")
    assert grounds(axes) == [COLOURS["card"], COLOURS["tint"], COLOURS["tint"]]  # two layers are nearest to three heads
