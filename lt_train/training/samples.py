"""The training samples of a batch, found by their tokens: batches have no sample names, and packs are split into documents again.

It runs only when a training must stop, so it may be slow.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from lt_train.dataset.examples import Example

SAMPLE_TENSORS = ("input_ids", "position_ids", "attention_mask")
"""The tensors of a batch that identify its samples."""

SHORTEST_PIECE = 16
"""Tokens of a shard's piece of a document from which on it is assumed to be in one sample only."""


def samples_in(batches: Sequence[Mapping[str, torch.Tensor]], examples: Sequence[Example]) -> list[str]:
    """The origin (`Example.where`) of the samples in `batches`, in order; of samples with equal tokens, all.

    Args:
        batches: of TRL's collator: rows with an attention_mask, or packed rows with position_ids. Rows may be shards of sequences.
    """
    texts = [(_as_text(example.input_ids), example.where) for example in examples]
    found: dict[str, None] = {}
    for batch in batches:
        for document in _documents(batch):
            piece = _as_text(document)
            named = [where for text, where in texts if text == piece]
            if not named and len(piece) >= SHORTEST_PIECE:
                named = [where for text, where in texts if piece in text]
            found |= dict.fromkeys(named)
    return list(found)


def _documents(batch: Mapping[str, torch.Tensor]) -> Iterator[list[int]]:
    if "attention_mask" in batch:
        for row_L, mask_L in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield row_L[mask_L.bool()].tolist()
        return
    for row_L, position_L in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = (position_L == 0).nonzero().flatten()[1:] if position_L[0] == 0 else (position_L == 0).nonzero().flatten()
        for document in row_L.tensor_split(starts.cpu()):
            yield document.tolist()


def _as_text(ids: Sequence[int]) -> str:
    """One character for each token: searching in text is fast in Python."""
    return "".join(map(chr, ids))
