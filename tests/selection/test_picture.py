import io

import numpy as np
import pytest
from matplotlib.image import imread

from lt_train.selection.fingerprint import Fingerprint, Sizes
from lt_train.selection.picture import draw_profile
from lt_train.selection.profile import LayerProfile, SampleScores


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
    draw_profile(profile_of(num_layers, strategies), (0,), path)
    height, width, _ = imread(io.BytesIO(path.read_bytes()), format="png").shape
    assert width >= max(1000, 25 * num_layers)
    assert height >= 350 * len(strategies)
    assert [file.name for file in path.parent.iterdir()] == ["profile.png"]


def test_the_layers_chosen_are_marked(tmp_path):
    profile = profile_of(8, ("nll",))
    pictures = []
    for chosen in ((0, 1), (6, 7)):
        draw_profile(profile, chosen, tmp_path / "profile.png")
        pictures.append((tmp_path / "profile.png").read_bytes())
    assert pictures[0] != pictures[1]
