import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Olmo3Config, Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.spec import HybridSpec
from lt_train.planning.compute import causal_pairs, streaming_pairs, training_compute
from lt_train.planning.setup import Machine
from lt_train.planning.shape import model_shape
from lt_train.planning.workload import Samples, Workload
from lt_train.runtime.units import GIB
from tests.support.public_models import public_recipe

CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
LENGTH = 96


LAYERS = {"layers": [0, 1]}


def compute_of(length: int = LENGTH, samples: int = 1, chosen: dict = LAYERS, **settings):
    hybrid = {**chosen, "lazy_layer_ratio": None, "strategy": None, "w_sink": 4, "w_recent": 60}
    recipe = public_recipe("qwen3-8b", hybrid=hybrid, **settings)
    work = Workload(Samples([length] * samples, "made up"), steps=1, epochs=1.0)
    return training_compute(model_shape(recipe, CONFIG), recipe.train, work)


def counted_products(layers_frozen: bool) -> int:
    """Operations of all matrix products of a forward and backward pass, as torch counts them; attention's are not among them."""
    model = build_hybrid(CONFIG, HybridSpec(4, (), 4, 60)).train()
    if layers_frozen:
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)  # so that gradients go all the way through
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(128, (1, LENGTH)), use_cache=False).logits.float().sum().backward()
    products = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in products.items() if operator.__name__ in ("mm", "addmm", "bmm"))


def test_linear_operations_are_those_that_torch_counts():
    head_again = 2 * 128 * 64 * LENGTH  # TRL's head makes its logits a second time in the backward pass
    assert compute_of().linear == counted_products(layers_frozen=False) + head_again


def test_frozen_weights_need_no_gradients_of_their_own():
    adapters = 2 * 3 * 2 * 16 * (64 + 64) * LENGTH  # of q_proj in two layers
    lora = compute_of(train={"method": "lora"}, lora={"targets": ["q_proj"]})
    assert lora.linear == counted_products(layers_frozen=True) + 2 * 128 * 64 * LENGTH + adapters


@pytest.mark.parametrize("length", [1, 3, 64, 65, 200])
def test_pairs_are_those_of_the_mask(length):
    at = torch.arange(length)
    assert streaming_pairs(length, window=64) == streaming_visible(at[:, None], at[None], 4, 60).sum()
    assert causal_pairs(length) == streaming_visible(at[:, None], at[None], 0, length).sum()


def test_attention_is_four_times_its_width_a_pair_and_three_times_that_with_the_backward_pass():
    pairs = 2 * causal_pairs(LENGTH) + 2 * streaming_pairs(LENGTH, 64)
    assert compute_of().attention == 3 * 4 * 64 * pairs
    assert compute_of().full_attention == 3 * 4 * 64 * 4 * causal_pairs(LENGTH)
    assert compute_of(train={"gradient_checkpointing": True}).attention == 4 * 4 * 64 * pairs


def test_attention_of_split_layers_is_that_of_their_kv_heads():
    by_head = compute_of(chosen={"streaming_kv_heads": [[0], [], [1], [0]]})
    pairs = 5 * causal_pairs(LENGTH) + 3 * streaming_pairs(LENGTH, 64)
    assert by_head.attention == 3 * 4 * 32 * pairs  # of half of the query heads each
    assert compute_of(chosen={"streaming_kv_heads": [[0], [1], [1], [0]]}).attention == compute_of().attention


def test_layers_that_slide_in_the_base_see_its_window_with_and_without_streaming_layers():
    base = Olmo3Config(
        **{name: value for name, value in CONFIG.to_dict().items() if name in Olmo3Config().to_dict() and name in SIZES},
        layer_types=["sliding_attention", "full_attention", "full_attention", "full_attention"],
        sliding_window=10,
    )
    recipe = public_recipe("qwen3-8b", hybrid={"layers": [1, 2], "lazy_layer_ratio": None, "strategy": None, "w_recent": 60})
    work = Workload(Samples([LENGTH], "made up"), steps=1, epochs=1.0)
    compute = training_compute(model_shape(recipe, base), recipe.train, work)
    sliding = streaming_pairs(LENGTH, 10)
    assert compute.attention == 3 * 4 * 64 * (sliding + 2 * streaming_pairs(LENGTH, 64) + causal_pairs(LENGTH))
    assert compute.full_attention == 3 * 4 * 64 * (sliding + 3 * causal_pairs(LENGTH))


def test_checkpointing_runs_the_layers_forward_once_more():
    layers = compute_of(train={"gradient_checkpointing": True}).linear - compute_of().linear
    assert layers == 2 * LENGTH * 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)


def test_a_teacher_costs_a_forward_pass_with_full_attention():
    taught = compute_of(train={"distill": {"weight": 0.5}})
    assert taught.attention - compute_of().attention == 4 * 64 * 4 * causal_pairs(LENGTH)
    stored = compute_of(train={"distill": {"weight": 0.5, "teacher": "top_k"}})
    assert stored.total == compute_of().total


def test_hours_follow_from_gpus_peak_and_efficiency():
    compute = compute_of(samples=1000)
    one, eight = (compute.hours(Machine(gpus, 80 * GIB, tflops=100, efficiency=0.5)) for gpus in (1, 8))
    assert one == pytest.approx(compute.total / 50e12 / 3600)
    assert eight == pytest.approx(one / 8)
