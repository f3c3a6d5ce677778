"""Streaming attention by flash-attention kernels, which support causal windows but no sinks: parts, merged by log-sum-exp.

With `reach = w_sink + w_recent - 1`, the first `reach` queries of a document see everything before them; the windows of later
queries do not reach the sinks. Three parts cover every visible key exactly once, and every flash attention computes each of them:

    head   queries < reach     causal, over the first `reach` tokens
    body   queries >= reach    causal window (w_recent - 1, 0), over the entire document
    sinks  queries >= reach    all of the w_sink keys

Body and sinks have the same queries: as softmaxes over disjoint keys they are merged by their log-sum-exps (LSE). The kernels'
own autograd cannot differentiate the merge, because an LSE of flash-attention 2 has no gradient. It is not needed: with
P = exp(scores - LSE) and D = rowsum(dout * out), the gradient of a softmax's scores is P * (dout v^T - D), so a kernel's backward
for one part, given the *merged* out and LSE, returns the gradient through that part's scores; the parts' gradients add up.

Shapes: B rows, T columns; N tokens of all documents laid end to end, n and m queries and keys of a part, P documents of a part,
H query heads, G key/value heads, D head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import Documents

TokenIndex: TypeAlias = slice | Tensor
"""Some of N tokens: contiguous ones as a slice, which needs no copy; others as a LongTensor, each at most once."""


@dataclass(frozen=True)
class Varlen:
    """The arguments of a varlen kernel besides the tensors.

    `cu_seqlens_q`, `cu_seqlens_k` (int32 [P + 1]) are the cumulative lengths of the documents' queries and keys. A query sees the
    keys from `window[0]` before to `window[1]` after its own position, -1 for no limit. Positions are counted from the *end* of a
    document's queries and keys, as flash attention counts them since 2.1. No document has 0 queries or 0 keys.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window: tuple[int, int]
    scaling: float


class FlashKernel(Protocol):
    """A fused attention over documents laid end to end (`varlen`), with the log-sum-exps that the merge needs. `name`: for logs."""

    name: str

    def forward(self, q_nHD: Tensor, k_mGD: Tensor, v_mGD: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        """out_nHD and lse_Hn, the natural logarithm of each query's sum of exp(scores). No autograd."""
        ...

    def backward(
        self,
        dout_nHD: Tensor,
        q_nHD: Tensor,
        k_mGD: Tensor,
        v_mGD: Tensor,
        out_nHD: Tensor,
        lse_Hn: Tensor,
        varlen: Varlen,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the attention whose out and LSE are given, through the scores of these queries and keys alone."""
        ...


@dataclass(frozen=True)
class AttentionPart:
    """Some queries and some keys of the documents. `joins`: an earlier part has the same queries, with other keys."""

    q_rows: TokenIndex
    k_rows: TokenIndex
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window: tuple[int, int]
    joins: bool = False

    def varlen(self, scaling: float) -> Varlen:
        return Varlen(self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k, self.window, scaling)


def streaming_parts(lengths: Sequence[int], w_sink: int, w_recent: int, device: torch.device) -> tuple[AttentionPart, ...]:
    """The parts of streaming attention over documents of these lengths; only those that have queries."""
    spans = _spans(lengths)
    if w_sink == 0:
        return (_part(spans, spans, (w_recent - 1, 0), device),)
    reach = w_sink + w_recent - 1
    heads = [(start, min(start + reach, end)) for start, end in spans]
    parts = [_part(heads, heads, (-1, 0), device)]
    longer = [(start, end) for start, end in spans if end - start > reach]
    if longer:
        queries = [(start + reach, end) for start, end in longer]
        sinks = [(start, start + w_sink) for start, _ in longer]
        parts.append(_part(queries, longer, (w_recent - 1, 0), device))
        parts.append(_part(queries, sinks, (-1, -1), device, joins=True))
    return tuple(parts)


def full_parts(lengths: Sequence[int], device: torch.device) -> tuple[AttentionPart, ...]:
    """Full causal attention over documents of these lengths."""
    spans = _spans(lengths)
    return (_part(spans, spans, (-1, 0), device),)


def attend_by_parts(
    documents: Documents,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    parts: tuple[AttentionPart, ...],
    scaling: float,
    kernel: FlashKernel,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The attention that `parts` make up, within each document; padding gets zeros. Returns out_BHTD.

    `sinks_H`: learned sinks, one more part that has no keys: its output is zero and its log-sum-exp the logit.
    """
    batch, _, length, _ = q_BHTD.shape
    q_NHD, k_NGD, v_NGD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGTD, v_BGTD))
    real_N = documents.once(("real tokens", q_BHTD.device), lambda: _real_tokens(documents, q_BHTD.device))
    if real_N is None:
        out_NHD = _Merged.apply(q_NHD, k_NGD, v_NGD, sinks_H, parts, scaling, kernel)
    else:
        real_NHD = _Merged.apply(q_NHD[real_N], k_NGD[real_N], v_NGD[real_N], sinks_H, parts, scaling, kernel)
        out_NHD = real_NHD.new_zeros(batch * length, *real_NHD.shape[1:]).index_put((real_N,), real_NHD)
    return out_NHD.unflatten(0, (batch, length)).transpose(1, 2)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        sinks_H: Tensor | None,
        parts: tuple[AttentionPart, ...],
        scaling: float,
        kernel: FlashKernel,
    ) -> Tensor:
        results = (_forward(kernel, part, q_NHD, k_NGD, v_NGD, scaling) for part in parts)
        if len(parts) == 1:  # all queries and all keys
            out_NHD, lse_HN = next(results)
        else:
            out_NHD, lse_HN = _joined(parts, results, q_NHD)
        if sinks_H is not None:
            out_NHD = (out_NHD * torch.sigmoid(lse_HN - sinks_H[:, None]).T[..., None]).to(out_NHD.dtype)
            lse_HN = torch.logaddexp(lse_HN, sinks_H[:, None].to(lse_HN.dtype))
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, sinks_H, out_NHD, lse_HN)
        ctx.parts, ctx.scaling, ctx.kernel = parts, scaling, kernel
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, sinks_H, out_NHD, lse_HN = ctx.saved_tensors
        d_sinks_H = None
        if sinks_H is not None:  # the value of a sink is zero, so the gradient of its score is 0 - D times its probability
            d_HN = torch.linalg.vecdot(dout_NHD.to(lse_HN.dtype), out_NHD.to(lse_HN.dtype)).T
            d_sinks_H = -((sinks_H[:, None] - lse_HN).exp() * d_HN).sum(1)
        dq_NHD, dk_NGD, dv_NGD = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_NHD, k_NGD, v_NGD))
        for part in ctx.parts:
            dq, dk, dv = ctx.kernel.backward(
                dout_NHD[part.q_rows].contiguous(),
                q_NHD[part.q_rows],
                k_NGD[part.k_rows],
                v_NGD[part.k_rows],
                out_NHD[part.q_rows].contiguous(),
                lse_HN[:, part.q_rows].contiguous(),  # the kernels read it by its data pointer
                part.varlen(ctx.scaling),
            )
            if len(ctx.parts) == 1:
                return dq, dk, dv, d_sinks_H, None, None, None
            dq_NHD[part.q_rows] += dq
            dk_NGD[part.k_rows] += dk
            dv_NGD[part.k_rows] += dv
        return dq_NHD, dk_NGD, dv_NGD, d_sinks_H, None, None, None


def _forward(
    kernel: FlashKernel, part: AttentionPart, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return kernel.forward(q_NHD[part.q_rows], k_NGD[part.k_rows], v_NGD[part.k_rows], part.varlen(scaling))


def _joined(parts: tuple[AttentionPart, ...], results: Iterable[tuple[Tensor, Tensor]], q_NHD: Tensor) -> tuple[Tensor, Tensor]:
    """out_NHD and lse_HN of all parts together."""
    tokens, heads = q_NHD.shape[:2]
    out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    lse_HN = q_NHD.new_empty(heads, tokens, dtype=torch.promote_types(q_NHD.dtype, torch.float32))
    for part, (out_nHD, lse_Hn) in zip(parts, results, strict=True):
        rows = part.q_rows
        if part.joins:
            out_nHD, lse_Hn = _merge(out_NHD[rows], lse_HN[:, rows], out_nHD, lse_Hn)
        out_NHD[rows], lse_HN[:, rows] = out_nHD, lse_Hn
    return out_NHD, lse_HN


def _merge(out_nHD: Tensor, lse_Hn: Tensor, other_nHD: Tensor, other_lse_Hn: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one over all of them; computed in the LSE's precision."""
    merged_Hn = torch.logaddexp(lse_Hn, other_lse_Hn)
    weight_nH1, other_weight_nH1 = ((lse - merged_Hn).exp().T[..., None] for lse in (lse_Hn, other_lse_Hn))
    return (weight_nH1 * out_nHD).add_(other_weight_nH1 * other_nHD).to(out_nHD.dtype), merged_Hn


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each document among the N tokens."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _part(
    q_spans: list[tuple[int, int]],
    k_spans: list[tuple[int, int]],
    window: tuple[int, int],
    device: torch.device,
    joins: bool = False,
) -> AttentionPart:
    (q_rows, cu_seqlens_q, max_seqlen_q), (k_rows, cu_seqlens_k, max_seqlen_k) = (
        _laid_out(q_spans, device),
        _laid_out(k_spans, device),
    )
    return AttentionPart(q_rows, k_rows, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, joins)


def _laid_out(spans: list[tuple[int, int]], device: torch.device) -> tuple[TokenIndex, Tensor, int]:
    """Token index, cumulative lengths and the longest length of these spans laid end to end."""
    lengths = [end - start for start, end in spans]
    cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    apart = any(end != start for (_, end), (start, _) in pairwise(spans))
    rows = torch.cat([torch.arange(*span) for span in spans]).to(device) if apart else slice(spans[0][0], spans[-1][1])
    return rows, cumulative, max(lengths)


def _real_tokens(documents: Documents, device: torch.device) -> Tensor | None:
    """Flat indices (row * T + column) of all tokens of the documents, in order; None where there is no padding."""
    rows, columns = documents.shape
    if sum(documents.lengths) == rows * columns:
        return None
    places = [torch.arange(length) + row * columns + start for row, start, length in documents.spans]
    return torch.cat(places).to(device)
