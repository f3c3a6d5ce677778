"""Loss on the answers of held-out samples: what a hybrid loses, with far less noise than graded answers have.

Logits are made for answer positions alone, a chunk at a time: a row of 32K tokens never has its 32K x 152K matrix of
them. Legend: B rows of a batch, L longest sample, H hidden size, A answer tokens of a batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lt_train.errors import UserError
from lt_train.evaluation.statistics import TokenLoss
from lt_train.examples import Example

LOGITS_AT_ONCE = 2**26
"""Logits in memory at a time: 256 MB in fp32."""


def answer_losses(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> Iterator[tuple[Example, TokenLoss]]:
    """The loss of every example's answer given its prompt, longest examples first.

    Batches are padded on the right; their size does not change a loss beyond rounding.

    Raises:
        UserError: an example exceeds the model's context.
    """
    model.eval()
    longest_first = sorted(examples, key=lambda example: -len(example))
    check_fits_context(model, longest_first)
    for start in range(0, len(longest_first), batch_size):
        batch = longest_first[start : start + batch_size]
        yield from zip(batch, batch_losses(model, batch), strict=True)


@torch.inference_mode()
def batch_losses(model: PreTrainedModel, batch: Sequence[Example]) -> list[TokenLoss]:
    input_ids_BL, attention_mask_BL = right_padded(batch, model.device)
    hidden_BLH = model.model(input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False).last_hidden_state
    # The state at one position predicts the token at the next.
    predicting_AH = torch.cat([hidden[len(e.prompt_ids) - 1 : len(e) - 1] for hidden, e in zip(hidden_BLH, batch, strict=True)])
    answers_A = torch.tensor([token for example in batch for token in example.answer_ids], device=model.device)
    nll_A = token_nll(model.lm_head, predicting_AH, answers_A)
    lengths = [len(example.answer_ids) for example in batch]
    return [TokenLoss(nll.sum().item(), len(nll)) for nll in nll_A.split(lengths)]


def token_nll(lm_head: torch.nn.Module, hidden_AH: torch.Tensor, targets_A: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of each target, in fp64 to be summed; logits in chunks, their softmax in fp32."""
    chunk = max(1, LOGITS_AT_ONCE // lm_head.out_features)
    losses = [
        cross_entropy(lm_head(hidden).float(), targets, reduction="none").double()
        for hidden, targets in zip(hidden_AH.split(chunk), targets_A.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def right_padded(batch: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (B, L); padded with token 0, which the mask hides and no answer position
    reads.
    """
    longest = max(map(len, batch))
    ids = [[*example.prompt_ids, *example.answer_ids] + [0] * (longest - len(example)) for example in batch]
    mask = [[1] * len(example) + [0] * (longest - len(example)) for example in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_fits_context(model: PreTrainedModel, longest_first: Sequence[Example]) -> None:
    context = model.config.max_position_embeddings
    if len(longest_first[0]) > context:
        raise UserError(
            f"{longest_first[0].where}: a sample of {len(longest_first[0])} tokens exceeds the model's context of "
            f"{context} tokens "
            f"(max_position_embeddings); set data.max_length to at most {context}"
        )
