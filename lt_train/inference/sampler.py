"""Which token comes next. The random numbers of a sample follow from (seed, position) alone, never from what shares its batch.

Shapes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lt_train.inference.requests import Sampling

LEAST = 1e-15
"""Of a temperature and of a penalty: smaller ones choose the same token, until a logit that is divided by both is infinite."""


def choose_tokens(logits_BV: Tensor, sampling: Sampling, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """One token a row.

    Args:
        logits_BV: fp32 or better. seeds: each row's own (`sample_seed`).
        positions: of the token to choose, counted from the first new one.
    """
    if sampling.greedy:
        return likeliest_tokens(logits_BV)
    probabilities_BV = filtered_probabilities(logits_BV, sampling)
    cumulative_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    uniform = [[uniform_number(seed, position)] for seed, position in zip(seeds, positions, strict=True)]
    uniform_B1 = torch.tensor(uniform, dtype=torch.float64, device=logits_BV.device)
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)[:, 0].tolist()


def likeliest_tokens(logits_BV: Tensor) -> list[int]:
    """The token with the largest logit of each row; of equals the first. On a CPU numpy takes a tenth of torch's time (2.13)."""
    if logits_BV.device.type == "cpu":
        return logits_BV.numpy().argmax(-1).tolist()
    return logits_BV.argmax(-1).tolist()


def filtered_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from [B, V], up to a factor of each row.

    The filters and their order are those of transformers: temperature, top_k, top_p of what top_k kept, min_p.
    """
    probabilities_BV = torch.softmax(logits_BV / max(sampling.temperature, LEAST), dim=-1)
    if sampling.top_k:
        probabilities_BV = keep_likeliest(probabilities_BV, sampling.top_k)
        probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        probabilities_BV = keep_nucleus(probabilities_BV, sampling.top_p)
    if sampling.min_p:
        floor_B1 = sampling.min_p * probabilities_BV.amax(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < floor_B1, 0)
    return probabilities_BV


def uniform_number(seed: int, position: int) -> float:
    """A number in [0, 1), of 32 bits: its product with a total stays below the total, so a search ends on a possible token."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{position}".encode()).digest()[:4]) / 2**32


def keep_likeliest(probabilities_BV: Tensor, top_k: int) -> Tensor:
    """Zero all but the `top_k` most likely tokens; of equals at the border all stay."""
    least_B1 = probabilities_BV.topk(min(top_k, probabilities_BV.shape[-1]), dim=-1).values[:, -1:]
    return probabilities_BV.masked_fill(probabilities_BV < least_B1, 0)


def keep_nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens that together reach top_p (arXiv 1904.09751).

    Sorted ascending, as in transformers: of equals at the border the same ones stay.
    """
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1)
    dropped_BV = sorted_BV.cumsum(dim=-1) <= 1 - top_p
    dropped_BV[:, -1] = False
    return torch.zeros_like(probabilities_BV).scatter(1, order_BV, sorted_BV.masked_fill(dropped_BV, 0.0))


def penalise_repetition(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens that a row has seen less likely (arXiv 1909.05858), in place."""
    for logits_V, tokens in zip(logits_BV, seen, strict=True):
        index = torch.tensor(sorted(set(tokens)), device=logits_V.device)
        values = logits_V[index]
        logits_V[index] = torch.where(values > 0, values / max(penalty, LEAST), values * penalty)
    return logits_BV
