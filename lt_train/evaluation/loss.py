"""Loss on the answers of held-out samples, and the divergence of the next tokens from the base's there: what a hybrid loses, with
far less noise than graded answers have.

Logits are made for answer positions alone, a chunk at a time: a row of 32K tokens never has its 32K x 152K matrix of
them. Legend: B rows of a batch, L longest sample, H hidden size, A answer tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel

from lt_train.dataset.examples import Example
from lt_train.evaluation.base_answers import BaseAnswers
from lt_train.evaluation.statistics import TokenLoss
from lt_train.inference.answer_hidden_states import answer_states

LOGITS_AT_ONCE = 2**26
"""Logits in memory at a time: 256 MB in fp32."""


def answer_losses(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> Iterator[tuple[Example, TokenLoss]]:
    """The loss of every example's answer given its prompt, longest examples first.

    Batches are padded on the right; their size does not change a loss beyond rounding.

    Raises:
        UserError: an example exceeds the model's context.
    """

    def nll(batch: Sequence[Example], hidden_AH: torch.Tensor) -> torch.Tensor:
        answers_A = torch.tensor([token for example in batch for token in example.answer_ids], device=hidden_AH.device)
        return token_nll(model.lm_head, hidden_AH, answers_A)

    return _by_example(model, examples, batch_size, nll)


def answer_divergences(
    model: PreTrainedModel, base: BaseAnswers, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[Example, TokenLoss]]:
    """KL(base || model) in nats, summed over the answer tokens of each example; longest examples first.

    Raises:
        UserError: an example exceeds the model's context.
    """
    head_VH = base.head_VH.to(model.lm_head.weight.device)

    def divergence(batch: Sequence[Example], hidden_AH: torch.Tensor) -> torch.Tensor:
        base_AH = torch.cat([base.states(example) for example in batch]).to(hidden_AH.device)
        return token_divergence(base_AH, head_VH, hidden_AH, model.lm_head.weight)

    return _by_example(model, examples, batch_size, divergence)


Measure = Callable[[Sequence[Example], torch.Tensor], torch.Tensor]
"""A batch and the states (A, H) that predict its answer tokens -> nats of each (A)."""


def _by_example(
    model: PreTrainedModel, examples: Sequence[Example], batch_size: int, measure: Measure
) -> Iterator[tuple[Example, TokenLoss]]:
    for batch, hidden_AH in answer_states(model, examples, batch_size):
        with torch.inference_mode():
            nats_A = measure(batch, hidden_AH)
        lengths = [len(example.answer_ids) for example in batch]
        yield from zip(batch, [TokenLoss(nats.sum().item(), len(nats)) for nats in nats_A.split(lengths)], strict=True)


def token_nll(lm_head: torch.nn.Linear, hidden_AH: torch.Tensor, targets_A: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of each target, in fp64 to be summed; logits in chunks, their softmax in fp32."""
    chunk = max(1, LOGITS_AT_ONCE // lm_head.out_features)
    losses = [
        cross_entropy(lm_head(hidden).float(), targets, reduction="none").double()
        for hidden, targets in zip(hidden_AH.split(chunk), targets_A.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def token_divergence(
    base_AH: torch.Tensor, base_head_VH: torch.Tensor, hidden_AH: torch.Tensor, head_VH: torch.Tensor
) -> torch.Tensor:
    """KL(base || model) (nats) of the next token at each position, in fp64 to be summed; logits in chunks, in fp32."""
    chunk = max(1, LOGITS_AT_ONCE // (2 * len(head_VH)))
    found = []
    for base, hidden in zip(base_AH.split(chunk), hidden_AH.split(chunk), strict=True):
        log_p, log_q = linear(base, base_head_VH).float().log_softmax(-1), linear(hidden, head_VH).float().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
    return torch.cat(found)
