"""The hidden states that predict the tokens of answers. The way from there to logits is the caller's, in chunks: a row of 32K
tokens must never have its 32K x 152K matrix of them.

Legend: B rows of a batch, L longest sample, H hidden size, A answer tokens of a batch.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from lt_train.dataset.examples import Example, longest_first
from lt_train.hybrid.context_length import context_length
from lt_train.runtime.errors import UserError


def answer_states(
    model: PreTrainedModel, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[Sequence[Example], torch.Tensor]]:
    """Batches, longest examples first, each with the final hidden states (A, H) that predict its answer tokens.

    Raises:
        UserError: an example exceeds the model's context.
    """
    model.eval()
    longest = longest_first(examples)
    check_fits_context(model, longest[0])
    for start in range(0, len(longest), batch_size):
        batch = list(longest[start : start + batch_size])
        input_ids_BL, attention_mask_BL = right_padded(batch, model.device)
        with torch.inference_mode():
            output = model.model(input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False)
            # The state at one position predicts the token at the next.
            rows = zip(output.last_hidden_state, batch, strict=True)
            predicting_AH = torch.cat([hidden_LH[len(e.prompt_ids) - 1 : len(e) - 1] for hidden_LH, e in rows])
        yield batch, predicting_AH


def right_padded(batch: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (B, L); padded with token 0, which the mask hides and no answer position
    reads.
    """
    longest = max(map(len, batch))
    ids = [[*example.prompt_ids, *example.answer_ids] + [0] * (longest - len(example)) for example in batch]
    mask = [[1] * len(example) + [0] * (longest - len(example)) for example in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_fits_context(model: PreTrainedModel, longest: Example) -> None:
    context = context_length(model.config.to_dict())
    if len(longest) > context:
        raise UserError(
            f"{longest.where}: a sample of {len(longest)} tokens exceeds the model's context of "
            f"{context} tokens "
            f"(max_position_embeddings); set data.max_length to at most {context}"
        )
