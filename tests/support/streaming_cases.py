"""The cases on which every kernel is compared with the reference, and how: on a CPU with stand-ins, on a GPU in bf16.

Shapes: B rows, T columns, H query heads, G key/value heads, D head size.
"""

from dataclasses import dataclass

import torch

from lt_train.hybrid.documents import Documents, find_documents
from lt_train.hybrid.reference import reference_streaming_attention


@dataclass(frozen=True)
class Case:
    """Rows of packed documents, as lists of lengths; shorter rows are padded on the left or on the right."""

    rows: tuple[tuple[int, ...], ...]
    w_sink: int = 4
    w_recent: int = 20
    heads: tuple[int, int] = (4, 2)
    pad_left: bool = False

    @property
    def sizes(self):
        return dict(w_sink=self.w_sink, w_recent=self.w_recent, scaling=0.3)


CASES = {
    "one document": Case(((150,),)),
    "rows of one document": Case(((150,), (150,))),
    "packed": Case(((70, 50, 30),)),
    "packed, rows of unequal length": Case(((70, 50, 30), (90, 11))),
    "left-padded": Case(((150,), (60,)), pad_left=True),
    "right-padded": Case(((150,), (60,))),
    "shorter than the sinks": Case(((2, 1, 3, 100),)),
    "all shorter than the sinks": Case(((2, 1, 3),)),
    "as long as sinks and window": Case(((23, 24, 25, 22),)),
    "all shorter than the window": Case(((9, 19, 5),)),
    "one query each after the sinks leave": Case(((24, 24),)),
    "window longer than the input": Case(((70, 30),), w_recent=500),
    "sinks longer than the input": Case(((70, 30),), w_sink=500),
    "more sinks than window": Case(((150, 90),), w_sink=40, w_recent=3),
    "no sinks": Case(((70, 50, 30),), w_sink=0),
    "window of one": Case(((70, 50, 30),), w_recent=1),
    "no sinks, window of one": Case(((70, 50),), w_sink=0, w_recent=1),
    "as many groups as heads": Case(((70, 50),), heads=(2, 2)),
    "one group": Case(((70, 50),), heads=(6, 1)),
    "five heads to a group": Case(((70, 50),), heads=(10, 2)),
    "longer than two tiles": Case(((300, 20),), w_recent=150),
}


def documents_of(case: Case, device="cpu") -> Documents:
    width = max(sum(lengths) for lengths in case.rows)
    mask, positions = torch.zeros(len(case.rows), width, dtype=torch.long), torch.zeros(len(case.rows), width, dtype=torch.long)
    for row, lengths in enumerate(case.rows):
        column = width - sum(lengths) if case.pad_left else 0
        mask[row, column : column + sum(lengths)] = 1
        positions[row, column : column + sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
    return find_documents(len(case.rows), width, torch.device(device), mask.to(device), positions.to(device))


def tensors_of(case: Case, dtype, device="cpu", size=16, seed=0):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(case.rows), max(sum(lengths) for lengths in case.rows)
    heads, groups = case.heads
    shapes = [(batch, count, length, size) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def expected_output(case: Case, documents: Documents, q, k, v):
    """The reference on every document by itself; zeros on padding."""
    out = torch.zeros_like(q)
    for row, start, length in documents.spans:
        place = (slice(row, row + 1), slice(None), slice(start, start + length))
        out[place] = reference_streaming_attention(q[place], k[place], v[place], **case.sizes)
    return out


def with_gradients(attention, q, k, v, dout):
    """[out, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
