from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lt_train.selection.fingerprint import Sizes
from lt_train.selection.lazy_ratio import lazy_ratios
from lt_train.selection.ranking import most_often_lazy
from tests.support.families import FAMILIES


def ratios_from_full_attention_weights(stock_model, input_ids, sizes: Sizes) -> list[float]:
    """Eq. 1 spelled out over the weights that transformers hands out, key by key; what they lack of 1 is on learned sinks."""
    with torch.no_grad():
        attentions = stock_model(torch.tensor([input_ids]), output_attentions=True).attentions
    queries = range(max(0, len(input_ids) - sizes.w_last), len(input_ids))
    ratios = []
    for weights_1HTT in attentions:
        per_query = [
            sum(
                (weights_1HTT[0, :, q, k] for k in range(q + 1) if k < sizes.w_sink or q - k < sizes.w_recent),
                start=1 - weights_1HTT[0, :, q].sum(-1),
            ).mean()
            for q in queries
        ]
        ratios.append(torch.stack(per_query).mean().item())
    return ratios


SIZES = list(product([1, 2, 7, 9, 40], [(2, 6), (0, 5), (4, 1), (3, 64)]))
CASES = [("qwen3", *case) for case in SIZES] + [(family, 40, (2, 6)) for family in FAMILIES if family != "qwen3"]


@pytest.mark.parametrize(("family", "tokens", "window"), CASES)
def test_lazy_ratio_equals_the_one_from_full_attention_weights(stock_model, hybrid_of, example_of, tokens, window):
    w_sink, w_recent = window
    sizes = Sizes(w_sink, w_recent, w_last=8, long_reach_share=0.1)
    example = example_of(1, tokens)
    input_ids = example.input_ids
    expected_L, hybrid = ratios_from_full_attention_weights(stock_model, input_ids, sizes), hybrid_of((), w_sink, w_recent)
    expected = [expected_L[layer] for layer in hybrid.spec.full_in_base]
    assert lazy_ratios(hybrid, input_ids, sizes) == pytest.approx(expected, abs=1e-5)


def test_a_sample_within_the_window_makes_every_layer_fully_lazy(hybrid_of, example_of):
    example = example_of(2, tokens=8)
    ratios = lazy_ratios(hybrid_of(), example.input_ids, Sizes(2, 6, 8, 0.1))
    assert ratios == pytest.approx([1.0] * 4, abs=1e-6)


def test_layers_that_stream_already_are_scored_as_if_they_were_full(hybrid_of, example_of):
    example, sizes = example_of(3), Sizes(2, 6, 8, 0.1)
    input_ids = example.input_ids
    assert lazy_ratios(hybrid_of((0, 2)), input_ids, sizes) == lazy_ratios(hybrid_of(()), input_ids, sizes)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_no_tensor_grows_with_the_square_of_the_length(hybrid_of, example_of):
    model, tokens = hybrid_of(), 1000
    example = example_of(4, tokens)
    with LargestTensor() as largest:
        lazy_ratios(model, example.input_ids, Sizes(2, 6, 8, 0.1))
    assert 0 < largest.numbers < tokens * tokens / 10


def test_the_layers_most_often_among_the_laziest_of_a_sample_are_chosen():
    ratios = [
        [0.99, 0.90, 0.80, 0.10],
        [0.10, 0.90, 0.80, 0.99],
        [0.10, 0.90, 0.80, 0.20],
    ]
    # Called lazy with two a sample: layer 1 three times, layers 0, 2 and 3 once; of these layer 2 has the highest mean.
    assert most_often_lazy(ratios, 2) == (1, 2)


def test_frequency_goes_before_the_mean():
    # Layer 0 has the higher mean, layer 1 is the lazier one in more samples.
    assert most_often_lazy([[0.2, 0.3], [0.2, 0.3], [0.9, 0.1]], 1) == (1,)


def test_layers_equal_in_all_samples_are_chosen_from_the_lowest():
    assert most_often_lazy([[0.5, 0.5, 0.5]] * 3, 2) == (0, 1)
