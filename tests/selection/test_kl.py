import pytest
import torch

from lt_train.selection.kl import mean_divergence
from lt_train.selection.token_losses import Variants


def probabilities(model, example) -> torch.Tensor:
    """Of the answer tokens, from one ordinary forward pass: [A, vocab_size]."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids]), use_cache=False).logits[0]
    return logits[len(example.prompt_ids) - 1 : -1].double().softmax(dim=-1)


def test_kl_is_the_mean_divergence_of_each_variant_from_the_full_model(hybrid_of, example_of):
    example = example_of(1)
    found_L, found_all = mean_divergence(Variants(hybrid_of(), example.prompt_ids, example.answer_ids).divergences())
    full = probabilities(hybrid_of(()), example)

    def expected(lazy_layers: tuple[int, ...]) -> float:
        return (full * (full / probabilities(hybrid_of(lazy_layers), example)).log()).sum(dim=-1).mean().item()

    assert found_L == pytest.approx([expected((layer,)) for layer in range(4)], rel=1e-3, abs=1e-6)
    assert found_all == pytest.approx(expected((0, 1, 2, 3)), rel=1e-3)
    assert min(found_L) > 0


def test_divergences_do_not_depend_on_how_many_positions_go_together(hybrid_of, example_of, monkeypatch):
    example = example_of(2, tokens=70)
    variants = Variants(hybrid_of(), example.prompt_ids, example.answer_ids)
    together = variants.divergences()
    monkeypatch.setattr("lt_train.inference.partial_logits.LOGITS_PER_CALL", 7 * 64)
    apart = variants.divergences()
    torch.testing.assert_close(together.one_streaming_LA, apart.one_streaming_LA, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.all_streaming_A, apart.all_streaming_A, rtol=0, atol=1e-5)
