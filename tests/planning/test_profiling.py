from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_base_config
from lt_train.planning.profiling import passes, profile_hours, profile_memory, profile_suggestions
from lt_train.planning.setup import Machine
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.units import GIB
from lt_train.selection.gates import gate_shares
from lt_train.selection.quadrature import MOST_POINTS, POINTS
from lt_train.selection.token_losses import Variants
from tests.support.families import SIZES
from tests.support.peak_memory import LiveBytes
from tests.support.public_models import public_recipe

BF16 = 2
LENGTH = 2048
HIDDEN = 256


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


SCORE = {
    "reach": lambda model, prompt_ids, answer_ids: Variants(model, prompt_ids, answer_ids).losses(),
    "kl": lambda model, prompt_ids, answer_ids: Variants(model, prompt_ids, answer_ids).divergences(),
    "gates": partial(gate_shares, long_reach_fraction=0.1),
}


def small(
    folder: Path, strategy: str, mlp: int, layers: int, length: int = LENGTH
) -> tuple[Recipe, ModelShape, Callable[[], object]]:
    """Recipe and shape of a small model, and what scores one sample of it."""
    sizes = {**SIZES, "hidden_size": HIDDEN, "intermediate_size": mlp, "num_hidden_layers": layers, "head_dim": 16}
    Qwen3Config(**sizes).save_pretrained(folder)
    path = folder / "recipe.yaml"
    path.write_text(
        f"{{name: x, model: {{base: {folder}}}, "
        f"hybrid: {{lazy_layer_ratio: 0.5, w_sink: 4, w_recent: 60, strategy: {strategy}, calibration: {{samples: 1}}}}, "
        f"data: {{source: a/b, format: still, max_length: {length}}}}}"
    )
    recipe, shape = planned(load_recipe(path))
    model = build_hybrid(load_base_config(recipe.model), HybridSpec(layers, (), 4, 60)).eval().requires_grad_(False)
    ids = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return recipe, shape, partial(SCORE[strategy], model, ids[:8], ids[8:])


@pytest.mark.parametrize(
    ("strategy", "mlp", "layers"), [("reach", 2048, 2), ("reach", 32, 8), ("kl", 2048, 2), ("gates", 1024, 2), ("gates", 256, 4)]
)
def test_the_states_and_the_work_are_what_scoring_a_sample_takes(strategy: str, mlp: int, layers: int, tmp_path: Path) -> None:
    """With a broad MLP mostly work, with many layers as many states."""
    recipe, shape, score = small(tmp_path, strategy, mlp, layers)
    needed = profile_memory(recipe, shape, Machine(1, GIB, cpu=True))
    with LiveBytes(held=score.args[0].parameters()) as counted:
        score()
    assert counted.peak == pytest.approx(needed.states + needed.workspace, rel=0.1)


class Operations(TorchDispatchMode):
    """Counts floating-point operations; torch's own FlopCounterMode does not support `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize(("strategy", "gate_points"), [*((name, len(POINTS)) for name in SCORE), ("gates", MOST_POINTS)])
def test_the_time_follows_from_the_operations_that_scoring_a_sample_takes(
    strategy: str, gate_points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short samples: torch does not count its own attention on a CPU. Checkpointing stops before down_proj, which a plan counts."""
    recipe, shape, score = small(tmp_path, strategy, mlp=256, layers=5, length=256)
    if gate_points == MOST_POINTS:
        monkeypatch.setattr("lt_train.selection.gates.ACCEPTED_GAP", -1.0)  # no sum of shares is near enough
    with Operations() as counted:
        score()
    machine = Machine(1, GIB, tflops=1.0, efficiency=1.0)
    hours = dict(zip((len(POINTS), MOST_POINTS), profile_hours(recipe, shape, machine), strict=True))
    assert 1.0 < hours[gate_points] * 3600 * 1e12 / counted.total < 1.15


def test_gates_take_the_same_passes_whatever_the_depth_and_one_layer_at_a_time_half_as_many_as_layers():
    assert [passes("gates", HybridSpec(layers, ()), 0.1).linear / layers for layers in (30, 64)] == [11, 11]
    assert [passes("gates", HybridSpec(layers, ()), 0.1, MOST_POINTS).linear / layers for layers in (30, 64)] == [35, 35]
    assert [passes("reach", HybridSpec(layers, ()), 0.1).linear / layers for layers in (30, 64)] == [17.5, 34.5]
    assert passes("lazy_ratio", HybridSpec(64, ()), 0.1).linear / 64 == 1


def test_layers_that_slide_in_the_base_run_and_are_not_scored():
    base = HybridSpec(4, (), sliding_layers=(0, 2), sliding_window=9)  # layer 0, full 1, layer 2, full 3
    reach, gates, lazy_ratio = (passes(strategy, base, 0.1) for strategy in ("reach", "gates", "lazy_ratio"))
    # layer 0 for the full model and the last variant, layer 2 for one variant more
    assert (reach.linear, reach.full, reach.streaming, reach.sliding, reach.head) == (12, 3, 4, 5, 4)
    assert (gates.linear, gates.full, gates.streaming, gates.sliding) == (44, 26, 26, 28)
    assert (lazy_ratio.linear, lazy_ratio.full, lazy_ratio.sliding) == (4, 2, 2)


def test_strategies_that_share_their_passes_take_no_longer_together(of_32b):
    _, shape = of_32b
    machine = Machine(8, 80 * GIB)
    alone, shared, more = (
        profile_hours(public_recipe("qwq-32b", hybrid={"strategy": "reach", "compare": others}), shape, machine)
        for others in ([], ["nll"], ["gates"])
    )
    assert alone == shared and alone[0] == alone[1]
    assert alone[0] < more[0] < 1.5 * alone[0] < more[1] < 2.5 * alone[0]


def test_gates_of_a_32b_model_fit_where_one_at_a_time_does(of_32b):
    _, shape = of_32b
    machine = Machine(8, 80 * GIB)
    gates, reach = (
        profile_memory(public_recipe("qwq-32b", hybrid={"strategy": name}), shape, machine) for name in ("gates", "reach")
    )
    assert gates.states < reach.states
    assert gates.peak < machine.usable
