import pytest
import torch
from transformers import Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_base_config
from lt_train.planning.profiling import profile_memory, profile_suggestions
from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.units import GIB
from lt_train.selection.token_losses import Variants
from tests.support.families import SIZES
from tests.support.peak_memory import LiveBytes
from tests.support.public_models import public_recipe

BF16 = 2
LENGTH = 2048


def planned(recipe: Recipe) -> tuple[Recipe, ModelShape]:
    return recipe, model_shape(recipe, load_base_config(recipe.model))


@pytest.fixture(scope="module")
def of_32b() -> tuple[Recipe, ModelShape]:
    """qwq-32b scores samples of 20,000 tokens."""
    return planned(public_recipe("qwq-32b", data={"max_length": 20_000}))


def test_one_process_has_the_base_its_variants_and_a_layers_work(of_32b):
    recipe, shape = of_32b
    needed = profile_memory(recipe, shape, Machine(1, 80 * GIB))
    assert needed.weights == BF16 * shape.base_parameters
    assert needed.states == (64 + 2) * 20_000 * 5120 * BF16
    assert needed.peak > 80 * GIB


def test_layers_are_spread_over_the_gpus_of_one_machine_and_no_others(of_32b):
    recipe, shape = of_32b
    alone, eight, sixteen = (profile_memory(recipe, shape, Machine(gpus, 80 * GIB)) for gpus in (1, 8, 16))
    assert alone.weights / 8 < eight.weights < alone.weights / 7
    assert (eight.gpus, sixteen) == (8, eight)
    assert profile_memory(recipe, shape, Machine(8, 80 * GIB, cpu=True)).gpus == 1


def test_what_does_not_fit_has_ways_out_that_fit(of_32b):
    recipe, shape = of_32b
    assert list(profile_suggestions(recipe, shape, Machine(8, 80 * GIB))) == []
    ways = list(profile_suggestions(recipe, shape, Machine(1, 80 * GIB)))
    assert "2 GPUs of this size in one machine" in ways
    (length,) = [int(way.rpartition("=")[2]) for way in ways if "hybrid.calibration.max_length" in way]
    for samples, fits in ((length, True), (length + 1024, False)):
        shorter = public_recipe("qwq-32b", data={"max_length": 20_000}, hybrid={"calibration": {"max_length": samples}})
        machine = Machine(1, 80 * GIB)
        assert (profile_memory(shorter, shape, machine).peak <= machine.usable) == fits


def test_a_choice_that_does_not_look_at_the_model_needs_nothing_and_lazy_ratio_one_variant(of_32b):
    _, shape = of_32b
    machine = Machine(1, 80 * GIB)
    assert profile_memory(public_recipe("qwq-32b", hybrid={"strategy": "periodic"}), shape, machine) is None
    lazy = profile_memory(public_recipe("qwq-32b", hybrid={"strategy": "lazy_ratio"}), shape, machine)
    assert lazy.states == 4096 * 5120 * BF16


@pytest.mark.parametrize(("mlp", "layers"), [(4096, 2), (512, 24)])
def test_the_states_and_the_work_are_what_scoring_a_sample_takes(mlp: int, layers: int, tmp_path) -> None:
    """With a broad MLP mostly work, with many layers mostly states."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": mlp, "num_hidden_layers": layers, "head_dim": 16}
    Qwen3Config(**sizes).save_pretrained(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"{{name: x, model: {{base: {tmp_path}}}, hybrid: {{lazy_layer_ratio: 0.5, w_sink: 4, w_recent: 60}}, "
        f"data: {{source: a/b, format: still, max_length: {LENGTH}}}}}"
    )
    recipe, shape = planned(load_recipe(path))
    needed = profile_memory(recipe, shape, Machine(1, GIB, cpu=True))
    model = build_hybrid(load_base_config(recipe.model), HybridSpec(layers, (), 4, 60)).eval()
    with LiveBytes(held=model.parameters()) as counted:
        score(model, LENGTH)
    assert counted.peak == pytest.approx(needed.states + needed.workspace, rel=0.1)


def score(model: HybridForCausalLM, length: int) -> None:
    ids = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    Variants(model, ids[:8], ids[8:]).losses()
