from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lt_train.inference.requests import Sampling, sample_seed
from lt_train.inference.sampler import choose_tokens, keep_likeliest, keep_nucleus, penalise_repetition, uniform_number


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


def test_temperature_sharpens_the_distribution() -> None:
    assert abs(drawn([0.6, 0.4], Sampling(0.5, 1.0, 1))[0] / 4000 - 0.36 / (0.36 + 0.16)) < 0.03


def test_greedy_takes_the_likeliest_whatever_else_is_set() -> None:
    assert choose_tokens(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(0.0, 0.1, 1, top_k=1), [0], [0]) == [1]


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (Sampling(1.0, 0.7, 1), TopPLogitsWarper(0.7)),
        (Sampling(1.0, 1.0, 1, top_k=5), TopKLogitsWarper(5)),
        (Sampling(1.0, 1.0, 1, min_p=0.2), MinPLogitsWarper(0.2)),
    ],
    ids=["top_p", "top_k", "min_p"],
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(sampling: Sampling, warper) -> None:
    logits_1V = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    allowed = set(warper(None, logits_1V).isfinite()[0].nonzero()[:, 0].tolist())
    seeds = [sample_seed(1, "p", sample) for sample in range(3000)]
    assert set(choose_tokens(logits_1V.expand(3000, -1), sampling, seeds, [0] * 3000)) == allowed
    assert 1 < len(allowed) < 12


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
