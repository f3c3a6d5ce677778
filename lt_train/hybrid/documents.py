"""The documents of a batch: rows with padding on either side, and rows that pack several documents.

Attention must never cross a document's border, and sinks are each document's own first tokens. Both hold when attention is computed
for each document by itself, counting from 0: documents are gathered into a right-padded batch, where causality alone hides the
padding from real queries, and the kernels need no mask.

Shapes: B rows, T columns, N documents of a group, L their longest length, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .spec import HybridError

T = TypeVar("T")
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_NHLD, k_NGLD, v_NGLD) -> out_NHLD, causal, each row one document from its first token."""

# Documents of similar length are computed in one kernel call; more spread would cost more padding than another call costs.
_SHORTEST_IN_GROUP = 0.75


@dataclass(frozen=True)
class Documents:
    """The documents of a batch.

    Attributes:
        shape: (B, T).
        spans: (row, first column, length in tokens) of each document, in reading order.
        position_ids: LongTensor [B, T], each token's position in its own document; 0 on padding.
    """

    shape: tuple[int, int]
    spans: tuple[tuple[int, int, int], ...]
    position_ids: Tensor
    _prepared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, prepare: Callable[[], T]) -> T:
        """A value that a kernel derives from these documents: `prepare` runs once, and all layers use the result."""
        if key not in self._prepared:
            self._prepared[key] = prepare()
        return self._prepared[key]

    @property
    def fill_rows(self) -> bool:
        """Whether each row is one document without padding, so that nothing needs to be gathered."""
        rows, columns = self.shape
        return len(self.spans) == rows and all(length == columns for _, _, length in self.spans)

    @property
    def are_packed(self) -> bool:
        rows = [row for row, _, _ in self.spans]
        return len(set(rows)) < len(rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, in reading order."""
        return tuple(length for _, _, length in self.spans)

    def attend(self, kernel: Kernel, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Run `kernel` on every document by itself; padding gets zeros. Returns out_BHTD."""
        if self.fill_rows:
            return kernel(q_BHTD, k_BGTD, v_BGTD)
        batch, heads, length, _ = q_BHTD.shape
        flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGTD, v_BGTD))
        places, outputs = [flat_q.new_zeros(0, dtype=torch.long)], [flat_v.new_zeros(0, heads, flat_v.shape[-1])]
        for index_NL in self.once(("groups", q_BHTD.device), lambda: self._groups(q_BHTD.device)):
            real_NL = index_NL >= 0
            gather_NL = index_NL.clamp(min=0)
            group = (x[gather_NL].transpose(1, 2) for x in (flat_q, flat_k, flat_v))
            outputs.append(kernel(*group).transpose(1, 2)[real_NL])
            places.append(index_NL[real_NL])
        output = torch.cat(outputs)
        out = output.new_zeros(batch * length, *output.shape[1:]).index_put((torch.cat(places),), output)
        return out.unflatten(0, (batch, length)).transpose(1, 2)

    def _groups(self, device: torch.device) -> list[Tensor]:
        """Documents grouped by length: LongTensors [N, L] of flat token indices (row * T + column), -1 for padding."""
        return [self._index(group, device) for group in self._by_length()]

    def _by_length(self) -> list[list[tuple[int, int, int]]]:
        groups: list[list[tuple[int, int, int]]] = []
        for span in sorted(self.spans, key=lambda span: -span[2]):
            if groups and span[2] >= _SHORTEST_IN_GROUP * groups[-1][0][2]:
                groups[-1].append(span)
            else:
                groups.append([span])
        return groups

    def _index(self, group: list[tuple[int, int, int]], device: torch.device) -> Tensor:
        columns = self.shape[1]
        first_N = torch.tensor([row * columns + start for row, start, _ in group], device=device)
        length_N = torch.tensor([length for _, _, length in group], device=device)
        offset_L = torch.arange(group[0][2], device=device)
        return torch.where(offset_L < length_N[:, None], first_N[:, None] + offset_L, -1)


def find_documents(
    batch: int, length: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Documents:
    """Find the documents from the mask and the positions of a forward pass.

    Args:
        attention_mask: [B, T], 1 on real tokens, or None for no padding. The real tokens of a row must be contiguous.
        position_ids: [B, T] (or [1, T] for all rows), restarting at 0 with each packed document; None where every row is one
            document.

    Raises:
        HybridError: a mask of another shape or with holes, or positions that do not count from 0 in steps of 1.
    """
    real = _real_tokens(batch, length, device, attention_mask)
    if position_ids is None:
        starts = real.clone()
        starts[:, 1:] &= ~real[:, :-1]
    else:
        position_ids = position_ids.to(device).expand(batch, length)
        starts = real & (position_ids == 0)
    spans = _spans(real, starts)
    counted = _positions(spans, batch, length, device)
    if position_ids is None or not torch.equal(counted[real], position_ids[real]):
        _refuse_holes(real)
    if position_ids is not None and not torch.equal(counted[real], position_ids[real]):
        raise HybridError(
            "position_ids: they must count 0, 1, 2, … from the first real token of each document, because sinks are the tokens at "
            "positions 0 to w_sink-1. Fix: leave position_ids out, or restart them at 0 with each document"
        )
    return Documents((batch, length), spans, counted)


def _real_tokens(batch: int, length: int, device: torch.device, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) != (batch, length):
        raise HybridError(
            f"attention_mask: shape {list(attention_mask.shape)}: a hybrid makes the masks of its layers itself. "
            f"Fix: pass a padding mask [batch, tokens] = [{batch}, {length}]"
        )
    return attention_mask.to(device).bool()


def _refuse_holes(real: Tensor) -> None:
    """generate() makes its position_ids from the mask: if the mask is incorrect, so are they."""
    runs_B = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(dim=1)
    if bool((runs_B > 1).any()):
        raise HybridError(
            f"attention_mask: it has a hole in row {int((runs_B > 1).nonzero()[0])}, and real tokens must be contiguous. Fix: hide "
            "padding on one side only, or pack documents by position_ids that restart at 0"
        )


def _spans(real: Tensor, starts: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Runs of real tokens, split where a document starts. The start of a run always begins one; its positions are checked later."""
    begins = starts.clone()
    begins[:, 0] |= real[:, 0]
    begins[:, 1:] |= real[:, 1:] & ~real[:, :-1]
    ends = begins.roll(-1, dims=1) | ~real.roll(-1, dims=1)
    ends[:, -1] = True
    first = begins.nonzero().tolist()
    last = (real & ends).nonzero().tolist()
    return tuple((row, start, end - start + 1) for (row, start), (_, end) in zip(first, last, strict=True))


def _positions(spans: tuple[tuple[int, int, int], ...], batch: int, length: int, device: torch.device) -> Tensor:
    positions = torch.zeros(batch, length, dtype=torch.long)
    for row, start, tokens in spans:
        positions[row, start : start + tokens] = torch.arange(tokens)
    return positions.to(device)
