import json
from itertools import islice
from statistics import fmean

import pytest
import torch

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.tokenizer import load_tokenizer
from lt_train.recipe.schema import Model
from lt_train.runtime.errors import UserError
from lt_train.selection.gates import (
    LARGEST_GAP,
    GateShares,
    check_sum_of_shares,
    describe_sum_of_shares,
    gate_gradients,
    gate_shares,
    gated_hidden_states,
    relative_gap,
)
from lt_train.selection.quadrature import FINER_POINTS, POINTS
from lt_train.selection.reach import long_reach_tokens
from lt_train.selection.token_losses import endpoint_losses, next_token_losses
from tests.support.families import FAMILIES
from tests.support.repository import REPOSITORY

HEADS = 2


def gated_losses(model, example, gate_LG) -> torch.Tensor:
    """Answer-token losses of the gated model."""
    input_ids, answer = torch.tensor([example.input_ids]), len(example.prompt_ids)
    with torch.no_grad():
        hidden_TD = gated_hidden_states(model, input_ids, gate_LG)[0]
        return next_token_losses(model, hidden_TD[answer - 1 : -1], input_ids[0, answer:])


def in_fp64(model):
    """The model in fp64 throughout: transformers' norms compute in fp32, too coarse for finite differences."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            exact.load_state_dict(module.state_dict())
            model.set_submodule(name, exact)
    return model


def all_gates(model, value: float) -> torch.Tensor:
    return torch.full((len(model.model.layers), HEADS), value, dtype=model.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_full_model_and_closed_ones_the_model_whose_every_layer_streams(hybrid_of, example_of):
    model, example = hybrid_of(), example_of(1)
    losses = endpoint_losses(model, example.prompt_ids, example.answer_ids)
    assert torch.equal(gated_losses(model, example, all_gates(model, 1.0)), losses.full_A)
    assert torch.equal(gated_losses(model, example, all_gates(model, 0.0)), losses.all_streaming_A)
    assert (losses.all_streaming_A - losses.full_A).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradients_equal_finite_differences(hybrid_of, example_of):
    model, example = in_fp64(hybrid_of()), example_of(2)
    position_R = len(example.prompt_ids) + torch.tensor([3, 11, 25])
    gate_LG = torch.rand(len(model.model.layers), HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found_LG = gate_gradients(model, torch.tensor([example.input_ids]), position_R, gate_LG)

    def loss(gate_LG: torch.Tensor) -> torch.Tensor:
        return gated_losses(model, example, gate_LG)[position_R - len(example.prompt_ids)].mean()

    step = 1e-5
    expected_LG = torch.empty_like(found_LG)
    for layer, head in torch.cartesian_prod(torch.arange(len(gate_LG)), torch.arange(HEADS)):
        change_LG = torch.zeros_like(gate_LG)
        change_LG[layer, head] = step
        expected_LG[layer, head] = (loss(gate_LG + change_LG) - loss(gate_LG - change_LG)) / (2 * step)
    torch.testing.assert_close(found_LG, expected_LG, rtol=1e-6, atol=1e-8)
    assert expected_LG.abs().min() > 1e-4


@pytest.mark.parametrize("points", [POINTS, FINER_POINTS])
def test_the_points_integrate_polynomials_of_the_fifth_degree_exactly(points):
    for degree in range(6):
        assert sum(weight * value**degree for value, weight in points) == pytest.approx(1 / (degree + 1))


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up_to_the_rise_of_the_long_reach_tokens_when_every_layer_streams(hybrid_of, example_of, seed):
    model, example = hybrid_of(), example_of(seed, tokens=60)
    shares = gate_shares(model, example.prompt_ids, example.answer_ids, 0.25)
    losses = endpoint_losses(model, example.prompt_ids, example.answer_ids)
    token_R = long_reach_tokens(losses, 0.25)
    assert len(token_R) == 10
    assert shares.measured_rise == pytest.approx((losses.all_streaming_A - losses.full_A)[token_R].mean().item())
    assert sum(shares.layers) == pytest.approx(shares.measured_rise, rel=LARGEST_GAP)
    assert sum(map(sum, shares.heads)) == pytest.approx(sum(shares.layers))


def test_a_head_whose_output_is_not_used_has_no_share(hybrid_of, example_of):
    model, example = hybrid_of(), example_of(3)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:, 16:].zero_()  # the query heads of the second of two KV heads
    shares = gate_shares(model, example.prompt_ids, example.answer_ids, 0.1)
    unused = [(layer, head) for layer, head_G in enumerate(shares.heads) for head, share in enumerate(head_G) if share == 0]
    assert unused == [(2, 1)]


def test_the_models_own_lazy_layers_and_the_parts_of_the_logits_do_not_matter(hybrid_of, example_of, monkeypatch):
    example = example_of(4, tokens=70)
    one = gate_shares(hybrid_of((1, 3)), example.prompt_ids, example.answer_ids, 0.5)
    monkeypatch.setattr("lt_train.inference.partial_logits.LOGITS_PER_CALL", 7 * 64)
    other = gate_shares(hybrid_of(()), example.prompt_ids, example.answer_ids, 0.5)
    torch.testing.assert_close(one.layers, other.layers, rtol=1e-4, atol=1e-5)


def test_shares_in_bf16_are_close_to_those_in_fp32(hybrid_of, example_of):
    example = example_of(5, tokens=60)

    def shares(model) -> torch.Tensor:
        return torch.tensor(gate_shares(model, example.prompt_ids, example.answer_ids, 0.5).heads)

    exact = shares(hybrid_of())
    spread = 0.1 * exact.abs().max().item()
    torch.testing.assert_close(shares(hybrid_of().bfloat16()), exact, rtol=0, atol=spread)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(shares(hybrid_of()), exact, rtol=0, atol=spread)


def steep(gate_LG):
    """Gradients of a loss that rises by one within a twentieth of the path, at equal parts of all gates."""
    value = gate_LG.flatten()[0].item()
    return torch.full_like(gate_LG, -20 / gate_LG.numel() if 0.475 < value < 0.525 else 0.0)


@pytest.mark.parametrize(
    ("gradients", "points"),
    [(lambda gate_LG: torch.full_like(gate_LG, -1 / gate_LG.numel()), 3), (steep, 11)],
    ids=["even", "steep"],
)
def test_gradients_are_taken_at_more_points_only_where_three_miss_the_rise(hybrid_of, example_of, monkeypatch, gradients, points):
    values = []

    def counted(model, input_ids, positions, gate_LG):
        values.append(gate_LG.flatten()[0].item())
        return gradients(gate_LG)

    monkeypatch.setattr("lt_train.selection.gates.gate_gradients", counted)
    monkeypatch.setattr("lt_train.selection.token_losses.EndpointLosses.rise_of_all", lambda *_: 1.0)
    shares = gate_shares(hybrid_of(), example_of(1).prompt_ids, example_of(1).answer_ids, 0.25)
    assert shares.points == len(values) == len(set(values)) == points
    gap = relative_gap(sum(shares.layers), 1.0)
    assert gap == pytest.approx(0) if points == 3 else gap < abs(20 * 8 / 18 - 1) / 2, "three points alone: 7.9"


def test_what_the_shares_cost_is_described_where_it_is_more_than_three_points():
    assert describe_sum_of_shares(1.9, 2.0, [3, 3]).endswith("the shares add up to 1.9, 5.0% apart")
    described = describe_sum_of_shares(1.9, 2.0, [3, 11, 11])
    assert described.endswith("5.0% apart; in 2 of 3 samples it took gradients at 11 points instead of 3")


SAMPLES = 4


@pytest.fixture(scope="module")
def reasoner_shares() -> list[GateShares]:
    """Of the tiny reasoner, at the quickstart's sizes."""
    base = REPOSITORY / "data/tiny-reasoner"
    model = load_hybrid(base, HybridSpec(8, (), 4, 12), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(Model(base=str(base)))
    found: list[GateShares] = []
    with (REPOSITORY / "data/ledger/train.jsonl").open() as rows:
        for row in map(json.loads, islice(rows, SAMPLES)):
            turns = [{"role": "user", "content": row["question"]}]
            prompt_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            found.append(gate_shares(model, prompt_ids, tokenizer(row["combined_text"]).input_ids, 0.1))
    return found


def test_the_layer_of_the_tiny_reasoner_that_looks_up_has_the_largest_share(reasoner_shares):
    mean_L = [fmean(layer) for layer in zip(*(shares.layers for shares in reasoner_shares), strict=True)]
    assert mean_L.index(max(mean_L)) == 1
    assert mean_L[1] > 0.4 * fmean(shares.measured_rise for shares in reasoner_shares)


def test_a_gap_is_relative_to_the_measured_rise_and_where_there_is_hardly_one_to_a_small_rise():
    assert relative_gap(2.3, 2.0) == pytest.approx(0.15)
    assert relative_gap(0.001, 0.0001) < 0.02
    check_sum_of_shares(2.29, 2.0, samples=4)
    check_sum_of_shares(0.004, -0.002, samples=4)
    with pytest.raises(UserError, match=r"over 4 samples .* add up to 1\.6 nats .* rises by 2 when every layer streams: 20% apart"):
        check_sum_of_shares(1.6, 2.0, samples=4)


def test_shares_of_the_tiny_reasoner_add_up_though_its_loss_rises_within_a_small_part_of_the_path(reasoner_shares):
    gaps = [relative_gap(sum(shares.layers), shares.measured_rise) for shares in reasoner_shares]
    assert max(shares.points for shares in reasoner_shares) == 11 and max(gaps) < 0.25
    sums, rises = zip(*((sum(shares.layers), shares.measured_rise) for shares in reasoner_shares), strict=True)
    check_sum_of_shares(fmean(sums), fmean(rises), samples=SAMPLES)
