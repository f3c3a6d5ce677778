import pytest
import torch

from lt_train.selection import token_losses as module
from lt_train.selection.ranking import smallest_rise
from lt_train.selection.token_losses import Variants, endpoint_losses
from tests.support.families import FAMILIES


def plain_losses(model, example) -> torch.Tensor:
    """Answer-token losses from one ordinary forward pass."""
    input_ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        logits = model(input_ids, use_cache=False).logits[0]
    answer = len(example.prompt_ids)
    return torch.nn.functional.cross_entropy(logits[answer - 1 : -1], input_ids[0, answer:], reduction="none")


CASES = [("qwen3", tokens) for tokens in (5, 9, 40, 150)] + [(family, 40) for family in FAMILIES if family != "qwen3"]


@pytest.mark.parametrize(("family", "tokens"), CASES)
def test_every_variant_equals_a_plain_forward_of_the_hybrid_it_stands_for(hybrid_of, example_of, tokens):
    example = example_of(1, tokens)
    losses = Variants(hybrid_of(), example.prompt_ids, example.answer_ids).losses()
    close = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.full_A, plain_losses(hybrid_of(()), example), **close)
    torch.testing.assert_close(losses.all_streaming_A, plain_losses(hybrid_of((0, 1, 2, 3)), example), **close)
    for row, layer in enumerate(hybrid_of().spec.full_in_base):
        torch.testing.assert_close(losses.one_streaming_LA[row], plain_losses(hybrid_of((layer,)), example), **close)
    assert len(losses.one_streaming_LA) == len(hybrid_of().spec.full_in_base)


def test_endpoints_are_the_losses_of_the_full_model_and_of_the_one_whose_every_layer_streams(hybrid_of, example_of):
    example = example_of(1)
    losses = endpoint_losses(hybrid_of((1,)), example.prompt_ids, example.answer_ids)
    variants = Variants(hybrid_of(), example.prompt_ids, example.answer_ids).losses()
    torch.testing.assert_close(losses.full_A, variants.full_A, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.all_streaming_A, variants.all_streaming_A, rtol=0, atol=1e-5)


def test_streaming_changes_losses_beyond_the_window_only(hybrid_of, example_of):
    example = example_of(2, tokens=60)
    losses = Variants(hybrid_of(), example.prompt_ids, example.answer_ids).losses()
    changed_LA = (losses.one_streaming_LA - losses.full_A).abs() > 1e-4
    # The first answer token is token 20, long beyond sinks and window (8 tokens).
    assert changed_LA.float().mean(dim=1).min() > 0.5
    short = example_of(2, tokens=9)
    losses = Variants(hybrid_of(), short.prompt_ids, short.answer_ids).losses()
    assert (losses.all_streaming_A - losses.full_A).abs().max() < 1e-5


def test_the_models_own_lazy_layers_do_not_matter(hybrid_of, example_of):
    example = example_of(3)
    one = Variants(hybrid_of((1, 3)), example.prompt_ids, example.answer_ids).losses()
    other = Variants(hybrid_of(()), example.prompt_ids, example.answer_ids).losses()
    assert torch.equal(one.one_streaming_LA, other.one_streaming_LA)


def test_losses_do_not_depend_on_how_many_variants_and_positions_go_together(hybrid_of, example_of, monkeypatch):
    model, example = hybrid_of(), example_of(4, tokens=70)
    together = Variants(model, example.prompt_ids, example.answer_ids).losses()
    monkeypatch.setattr(module, "TOKENS_PER_CALL", 1)
    monkeypatch.setattr("lt_train.inference.partial_logits.LOGITS_PER_CALL", 7 * model.config.vocab_size)
    apart = Variants(model, example.prompt_ids, example.answer_ids).losses()
    for one, other in zip(vars(together).values(), vars(apart).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_layers_below_the_one_that_streams_run_once(hybrid_of, example_of):
    model, example = hybrid_of(), example_of(5)
    rows = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, inputs, _output: rows.append(inputs[0].shape[0]))
    Variants(model, example.prompt_ids, example.answer_ids).losses()
    layers = len(model.model.layers)
    # Full and later variants: 1 + 2 + ... + L rows; the streaming one that is born in each layer; the one streaming in all.
    assert sum(rows) == layers * (layers + 1) / 2 + 2 * layers


def test_the_layers_with_the_smallest_mean_rise_come_first():
    rises = [[0.5, -0.1, 0.0, 0.2], [0.1, -0.1, 0.0, 0.9]]
    assert smallest_rise(rises, 1) == (1,)
    assert smallest_rise(rises, 3) == (0, 1, 2)


def test_layers_of_equal_rise_are_taken_from_the_lowest():
    assert smallest_rise([[0.1, 0.0, 0.0, 0.0]], 2) == (1, 2)
