"""The engine computes with packed weights on x86 CPUs; the model keeps its own."""

import copy
from contextlib import contextmanager, nullcontext
from ctypes import c_int
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen2Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference import packed_weights
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine, default_budget
from lt_train.inference.kv_store import KVStore
from lt_train.inference.packed_weights import MOST_ROWS, PackedLinear, obstacle_here, obstacle_to_packing, packed_bytes, packed_for
from lt_train.inference.runner import ModelRunner
from lt_train.runtime.units import GIB
from tests.support.avx2 import compiled_for_avx2
from tests.support.families import FAMILIES, WITH_SINKS, base_of, on_base
from tests.support.tiny_engine import GREEDY, MANY, answered, letter_tokenizer, requests, texts, tiny_model

SPEC = HybridSpec(num_layers=3, lazy_layers=(1, 2), w_sink=2, w_recent=6)
PROMPTS = [(0, [3, 4, 5, 6]), (1, [7, 8]), (2, [9] * 20)]

pytestmark = pytest.mark.skipif(obstacle_here() is not None, reason=f"no weights are packed: {obstacle_here()}")


@pytest.fixture(autouse=True)
def tiny_weights_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)


@pytest.fixture
def model() -> HybridForCausalLM:
    return tiny_model(SPEC)


@contextmanager
def without_packing():
    with patch.object(packed_weights, "obstacle_here", lambda: "the test"):
        yield


def biased_and_tied() -> HybridForCausalLM:
    """Biases at queries, keys and values, and an output matrix that is the embedding."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = build_hybrid(Qwen2Config(vocab_size=67, tie_word_embeddings=True, **sizes), SPEC).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    return model


def logits(model: HybridForCausalLM, pack: bool) -> torch.Tensor:
    """Of a prefill in two chunks and three steps of three sequences."""
    store = KVStore(model, slots=3, pages=3)
    with nullcontext() if pack else without_packing():
        runner = ModelRunner(model, store, prefill_chunk=16)
    for _, ids in PROMPTS:
        store.admit(len(ids) + 3)
    return torch.stack([runner.prefill(PROMPTS), *(runner.step([10, 11, 12]) for _ in range(3))])


@pytest.mark.parametrize("build", [lambda: tiny_model(SPEC), biased_and_tied], ids=["no biases", "biases, tied"])
def test_packed_weights_give_the_logits_of_the_stored_ones(build) -> None:
    model = build()
    torch.testing.assert_close(logits(model, pack=True), logits(model, pack=False), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_of_every_family_give_the_logits_of_the_stored_ones(family) -> None:
    config = base_of(family)
    spec = on_base(config, HybridSpec(num_layers=4, lazy_layers=(1, 2), w_sink=0 if family in WITH_SINKS else 2, w_recent=6))
    torch.manual_seed(0)
    model = build_hybrid(config, spec).eval()
    torch.testing.assert_close(logits(model, pack=True), logits(model, pack=False), atol=1e-4, rtol=0)


def test_every_linear_layer_of_the_runners_model_is_packed_and_shares_the_stored_tensors(model) -> None:
    packed = packed_for(model, rows=3)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 3 * 7 + 1
    assert {id(tensor) for tensor in packed.parameters()} == {id(tensor) for tensor in model.parameters()}
    packed = sum(layer.linear.weight.numel() for layer in layers)
    assert packed_bytes(model) == packed * 4 <= sum(layer.packed.numel() for layer in layers) * 4


def test_greedy_answers_are_the_same_with_and_without_packing(model) -> None:
    engine = Engine(model, letter_tokenizer(), max_slots=4)
    packed = texts(answered(engine, requests(MANY, samples=2), GREEDY))
    with without_packing():
        assert texts(answered(engine, requests(MANY, samples=2), GREEDY)) == packed


def test_two_runs_with_packed_weights_give_equal_bits(model) -> None:
    assert torch.equal(logits(model, pack=True), logits(model, pack=True))


def test_after_answers_the_model_has_its_own_weights_and_trains(model) -> None:
    before = copy.deepcopy(model.state_dict())
    answered(Engine(model, letter_tokenizer()), requests(MANY), GREEDY)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_an_engine_answers_with_the_weights_that_the_model_has_at_the_time_of_a_request(model) -> None:
    """Between two evaluations a training changes the weights: nothing of the earlier ones stays packed."""
    engine = Engine(model, letter_tokenizer())
    first = texts(answered(engine, requests(MANY), GREEDY))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-1)
    second = texts(answered(engine, requests(MANY), GREEDY))
    assert second != first
    assert second == texts(answered(Engine(copy.deepcopy(model), letter_tokenizer()), requests(MANY), GREEDY))


def test_the_stored_weights_are_used_where_packing_is_not_possible_or_gains_nothing(model, monkeypatch) -> None:
    assert obstacle_to_packing(model, 3) is None
    assert obstacle_to_packing(model, 1) == "one sequence gains nothing"
    assert obstacle_to_packing(tiny_model(SPEC, torch.bfloat16), 3) == "the weights are in bfloat16, and only float32 is packed"
    assert obstacle_to_packing(model.to("meta"), 3) == "the model is on meta"


def test_a_single_sequence_with_a_draft_has_rows_enough_for_packed_weights(model, monkeypatch) -> None:
    """Its round has a row for each drafted token."""
    draft = Draft.of(SPEC, None, 4)
    runners = [ModelRunner(model, KVStore(model, 1, 3, each), prefill_chunk=16) for each in (None, draft)]
    assert [any(isinstance(module, PackedLinear) for module in runner.model.modules()) for runner in runners] == [False, True]
    monkeypatch.setattr("lt_train.inference.engine.free_memory", lambda device: GIB)
    assert Engine(model, letter_tokenizer(), max_slots=1, draft=draft).budget == int(0.8 * (GIB - packed_bytes(model)))


@pytest.mark.parametrize(
    ("settings", "obstacle"), [({"CC": "no-such-compiler"}, "there is no C compiler"), ({}, "the CPU has no AVX2")]
)
def test_where_products_cannot_be_compiled_the_stored_weights_are_used(settings, obstacle, model, monkeypatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if not settings:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(packed_weights, "_library", packed_weights._library.__wrapped__)  # nothing is kept
    monkeypatch.setattr(packed_weights, "compiled", packed_weights.compiled.__wrapped__)
    monkeypatch.setattr(packed_weights, "obstacle_here", obstacle_here.__wrapped__)
    assert str(obstacle_to_packing(model, 3)).startswith(obstacle)
    assert packed_for(model, 3) is model


def test_packed_copies_that_do_not_fit_in_memory_are_not_made(model, monkeypatch) -> None:
    monkeypatch.setattr(packed_weights, "free_memory", lambda device: 2 * packed_bytes(model) - 1)
    assert packed_for(model, 3) is model
    assert str(obstacle_to_packing(model, 3)).startswith("packed copies take ")


def test_the_default_kv_budget_leaves_room_for_the_packed_copies(model, monkeypatch) -> None:
    monkeypatch.setattr("lt_train.inference.engine.free_memory", lambda device: GIB)
    assert default_budget(model, max_slots=8) == int(0.8 * (GIB - packed_bytes(model)))
    assert default_budget(model, max_slots=1) == int(0.8 * GIB)
    assert Engine(model, letter_tokenizer(), max_slots=8).budget == default_budget(model, 8)


def test_only_weights_that_gain_from_it_are_packed(model, monkeypatch) -> None:
    monkeypatch.setattr(packed_weights, "SMALLEST", 32 * 64)
    layers = {name.rsplit(".", 1)[-1] for name, module in packed_for(model, 3).named_modules() if isinstance(module, PackedLinear)}
    assert layers == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # 32 x 64; keys, values and the head have less
    assert packed_bytes(model) == 3 * 5 * 32 * 64 * 4
    monkeypatch.setattr(packed_weights, "SMALLEST", 2**18)
    assert obstacle_to_packing(model, 3) == "the weights are too small to gain"
    assert packed_for(model, 3) is model


@pytest.fixture(params=[None, 16], ids=["this processor", "AVX2"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For which the products are compiled; 16: outputs of a block for AVX2."""
    if request.param is not None:
        monkeypatch.setattr(packed_weights, "compiled", compiled_for_avx2)
        library = packed_weights._library.__wrapped__()
        assert c_int.in_dll(library, "block").value == request.param
        monkeypatch.setattr(packed_weights, "_library", lambda: library)


@pytest.mark.parametrize("outputs", [64, 45, 7])  # whole blocks, and one that is not full
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_number_of_rows_are_those_of_the_stored_weights(processor, outputs, bias) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(33, outputs, bias=bias)
    layer = PackedLinear(linear)
    with torch.inference_mode():
        for rows in (*range(1, 31), 100, MOST_ROWS):
            x_RD = torch.randn(33, rows).mT  # not contiguous
            exact = torch.nn.functional.linear(x_RD.double(), linear.weight.double(), linear.bias.double() if bias else None)
            torch.testing.assert_close(layer(x_RD), exact.float(), atol=2e-6, rtol=0)


def test_a_row_is_the_same_to_the_last_bit_whatever_shares_the_batch(processor) -> None:
    layer, x_RD = PackedLinear(torch.nn.Linear(48, 96)), torch.randn(MOST_ROWS, 48)
    with torch.inference_mode():
        together = layer(x_RD)
        for rows in (1, 2, 5, 13, 14, 15, 29, 100):
            assert torch.equal(layer(x_RD[-rows:]), together[-rows:])


def test_more_rows_and_none_are_multiplied_by_the_stored_weights(monkeypatch) -> None:
    linear = torch.nn.Linear(32, 16)
    layer = PackedLinear(linear)
    layer.packed.zero_()
    layer.packed_bias.zero_()
    with torch.inference_mode():
        for rows, stored in ((0, True), (MOST_ROWS, False), (MOST_ROWS + 1, True)):
            x_RD = torch.randn(rows, 32)
            assert torch.equal(layer(x_RD), linear(x_RD) if stored else torch.zeros(rows, 16))


def test_a_profile_of_operators_shows_packed_products() -> None:
    layer = PackedLinear(torch.nn.Linear(32, 16))
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        layer(torch.randn(2, 32))
    assert "packed product" in {event.name for event in profiled.events()}
