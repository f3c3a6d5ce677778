from collections import Counter
from itertools import combinations, product

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lt_train.inference.requests import Sampling, sample_seed
from lt_train.inference.sampler import (
    choose_tokens,
    filtered_probabilities,
    keep_likeliest,
    keep_nucleus,
    likeliest_tokens,
    penalise_repetition,
    uniform_number,
)


def drawn(probabilities: list[float], sampling: Sampling, draws: int = 4000) -> Counter[int]:
    seeds = [sample_seed(0, "p", sample) for sample in range(draws)]
    logits_BV = torch.tensor(probabilities).log().expand(draws, -1)
    return Counter(choose_tokens(logits_BV, sampling, seeds, [0] * draws))


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = [0.5, 0.0, 0.3, 0.15, 0.05]
    counts = drawn(probabilities, Sampling(1.0, 1.0, 1))
    assert counts[1] == 0
    for token, probability in enumerate(probabilities):
        assert abs(counts[token] / 4000 - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5 + 1e-9


def test_the_likeliest_token_is_the_first_of_equals_as_for_torch() -> None:
    logits_BTV = torch.randn(7, 2, 50, generator=torch.Generator().manual_seed(0)).round()
    assert likeliest_tokens(logits_BTV[:, 1]) == logits_BTV[:, 1].argmax(-1).tolist()
    assert likeliest_tokens(torch.tensor([[0.0, 2.0, 2.0], [-3.0, -3.0, -4.0]])) == [1, 0]


def test_temperature_sharpens_the_distribution() -> None:
    assert abs(drawn([0.6, 0.4], Sampling(0.5, 1.0, 1))[0] / 4000 - 0.36 / (0.36 + 0.16)) < 0.03


@pytest.mark.parametrize("penalty", [1.0, 1e-45])
def test_the_smallest_temperature_and_penalty_take_the_likeliest(penalty: float) -> None:
    logits_1V = penalise_repetition(torch.tensor([[3.0, 20.0, 19.999, -20.0]]), [[1, 3]], penalty)
    assert choose_tokens(logits_1V, Sampling(1e-45, 1.0, 1), [7], [0]) == [1]


def test_greedy_takes_the_likeliest_whatever_else_is_set() -> None:
    assert choose_tokens(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(0.0, 0.1, 1, top_k=1), [0], [0]) == [1]


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}  # in the order of transformers' generate()
SETTINGS = {"temperature": [0.6, 1.7], "top_k": [3, 20], "top_p": [0.5, 0.9], "min_p": [0.02, 0.2]}


@pytest.mark.parametrize("names", [names for size in (1, 2, 3, 4) for names in combinations(WARPERS, size)], ids="-".join)
def test_the_distribution_is_that_of_transformers_for_any_filters_together(names: tuple[str, ...]) -> None:
    logits_BV = 2 * torch.randn(64, 50, generator=torch.Generator().manual_seed(3))
    logits_BV[32:] = logits_BV[32:].round()  # with ties, as logits in bf16 have
    for values in product(*(SETTINGS[name] for name in names)):
        settings = {"temperature": 1.0, "top_p": 1.0} | dict(zip(names, values, strict=True))
        warpers = LogitsProcessorList([WARPERS[name](value) for name, value in zip(names, values, strict=True)])
        expected_BV = warpers(None, logits_BV).softmax(-1)
        filtered_BV = filtered_probabilities(logits_BV, Sampling(max_new_tokens=1, **settings))
        torch.testing.assert_close(filtered_BV / filtered_BV.sum(-1, keepdim=True), expected_BV)
        assert ((filtered_BV > 0) == (expected_BV > 0)).all()


def test_the_tokens_drawn_are_those_that_the_filters_keep() -> None:
    logits_1V = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(0.8, 0.9, 1, top_k=8, min_p=0.02)
    kept = filtered_probabilities(logits_1V, sampling)[0].nonzero()[:, 0].tolist()
    seeds = [sample_seed(1, "p", sample) for sample in range(3000)]
    assert set(choose_tokens(logits_1V.expand(3000, -1), sampling, seeds, [0] * 3000)) == set(kept)
    assert 1 < len(kept) < 8


def test_repetition_is_penalised_as_transformers_does_it() -> None:
    logits_BV = torch.randn(2, 9)
    seen = [[1, 1, 4], [0, 8, 3]]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(seen), logits_BV.clone())
    torch.testing.assert_close(penalise_repetition(logits_BV.clone(), seen, 1.3), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [False, True, False, False]),
        (0.5, [False, True, False, False]),
        (0.51, [True, True, False, False]),
        (0.99, [True] * 4),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[bool]) -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    assert (keep_nucleus(probabilities, top_p) > 0).tolist() == [kept]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert (keep_likeliest(torch.tensor([[0.2, 0.8]]), 50) > 0).all()


def test_a_number_follows_from_seed_and_position_alone() -> None:
    assert uniform_number(5, 0) == uniform_number(5, 0)
    numbers = {uniform_number(seed, position) for seed in range(30) for position in range(30)}
    assert len(numbers) == 900 and min(numbers) >= 0 and max(numbers) < 1
    assert abs(sum(numbers) / 900 - 0.5) < 0.04
