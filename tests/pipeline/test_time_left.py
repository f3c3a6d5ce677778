"""The time that a run has left, where the plan's operations are not those that were computed."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from lt_train.pipeline.time_left import _operations
from lt_train.planning.shape import model_shape
from lt_train.recipe.loading import load_recipe


def test_a_profile_counts_the_points_at_which_gates_took_gradients(inputs):
    recipe = load_recipe(inputs / "recipe.yaml", ["hybrid.strategy=gates"])
    shape = model_shape(recipe, AutoConfig.from_pretrained(recipe.model.base))

    def operations(*points):
        profile = SimpleNamespace(samples=[SimpleNamespace(gate_points=count) for count in points]) if points else None
        return _operations("profile", SimpleNamespace(recipe=recipe, calibration=[range(100)] * 2, layer_profile=profile), shape)

    least, most = operations(3, 3), operations(11, 11)
    assert operations() == least
    assert most / least == pytest.approx(35 / 11, rel=0.1)  # the head is passed through less often
    assert operations(3, 11) == pytest.approx((least + most) / 2)
