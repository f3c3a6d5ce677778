"""Streaming attention in time and memory linear in length, in plain torch, on any device, with a backward pass of its own.

Queries are computed a block at a time. A block's keys are the sinks and one span of recent keys. All of its queries see all of
them except in two corners: the keys after a query, and the keys before its window. So scores are plain matrix products of which
only the corners are masked, and small enough to stay in a processor's cache from one step to the next. The backward pass computes
each block's probabilities again and needs only q, k and v.

Blocks of bf16 and fp16 are computed in fp32: rounded to bf16, scores of 50 would be off by 0.1, and probabilities by 10 %.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens with queries, the last of K tokens, D head size, P = B * G
groups of query heads that share keys, N of them computed at a time, Q queries of a block, S keys of a block, RQ = R * Q rows of its
scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .mask import full_visible, streaming_visible
from .spec import HybridError

# Rows of one group's scores. Fewer rows waste less on the corners, more make matrix products faster: measured best on a CPU.
# Elsewhere each step costs a kernel launch, and larger blocks need fewer steps.
_ROWS_ON_CPU, _ROWS_ELSEWHERE = 128, 1024
_SMALLEST_BLOCK, _LARGEST_BLOCK = 32, 256
# Scores in memory at a time: on a CPU as many as the caches of two cores hold.
_SCORES_ON_CPU, _SCORES_ELSEWHERE = 2**20, 2**26


def blocked_streaming_attention(
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    *,
    w_sink: int,
    w_recent: int,
    scaling: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Streaming attention over rows that are one document each.

    Args:
        q_BHTD: queries after rotary embedding. k_BGKD, v_BGKD: keys and values; G divides H (grouped-query attention). Where
            T < K the first keys have no query.
        w_sink, w_recent: sizes in tokens; the window includes the query itself.
        sinks_H: learned sinks, in fp32 or better.

    Returns:
        out_BHTD, equal to the reference attention. It can be differentiated once.

    Raises:
        HybridError: in a backward pass with create_graph=True.
    """
    if q_BHTD.shape[2] == k_BGKD.shape[2] <= w_sink + w_recent and sinks_H is None:  # every query sees all before it
        grouped = q_BHTD.shape[1] != k_BGKD.shape[1]
        return scaled_dot_product_attention(q_BHTD, k_BGKD, v_BGKD, is_causal=True, scale=scaling, enable_gqa=grouped)
    device = q_BHTD.device.type
    if torch.is_autocast_enabled(device):  # autocast casts for scaled_dot_product_attention, but not for this function
        q_BHTD, k_BGKD, v_BGKD = (x.to(torch.get_autocast_dtype(device)) for x in (q_BHTD, k_BGKD, v_BGKD))
    with torch.autocast(device, enabled=False):
        return _BlockedAttention.apply(q_BHTD, k_BGKD, v_BGKD, sinks_H, w_sink, w_recent, scaling)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHTD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        sinks_H: Tensor | None,
        w_sink: int,
        w_recent: int,
        scaling: float,
    ) -> Tensor:
        ctx.sizes = w_sink, w_recent, scaling
        q_PRTD, k_PKD, v_PKD = _by_group(q_BHTD, k_BGKD, v_BGKD, scaling)
        out_PRTD = v_PKD.new_empty(*q_PRTD.shape[:3], v_PKD.shape[2])
        work = _Workspace(q_PRTD, k_PKD.shape[1], w_sink, w_recent, sinks_H)
        for block in work.blocks():
            probabilities = work.probabilities(block, block.rows(q_PRTD), block.span(k_PKD))
            block.put_rows(torch.bmm(probabilities, block.span(v_PKD)), out_PRTD)
        out_BHTD = out_PRTD.view(*q_BHTD.shape[:3], v_BGKD.shape[3])
        ctx.save_for_backward(q_BHTD, k_BGKD, v_BGKD, sinks_H, None if sinks_H is None else out_BHTD, work.on_sink_PRT)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, d_out_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would treat q, k and v as constants
            raise HybridError(
                "attention: blocked: no second derivative, which create_graph=True requests. Fix: set attention to reference"
            )
        q_BHTD, k_BGKD, v_BGKD, sinks_H, out_BHTD, on_sink_PRT = ctx.saved_tensors
        w_sink, w_recent, scaling = ctx.sizes
        with torch.autocast(d_out_BHTD.device.type, enabled=False):
            d_qkv = _gradients(q_BHTD, k_BGKD, v_BGKD, sinks_H, d_out_BHTD, w_sink, w_recent, scaling)
            d_sinks_H = None
            if sinks_H is not None:  # the value of a sink is zero, so the gradient of its score is 0 - D times its probability
                d_BHT = torch.linalg.vecdot(d_out_BHTD.to(sinks_H.dtype), out_BHTD.to(sinks_H.dtype))
                d_sinks_H = -(on_sink_PRT.view_as(d_BHT) * d_BHT).sum((0, 2))
            return *d_qkv, d_sinks_H, None, None, None


def _gradients(
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    sinks_H: Tensor | None,
    d_out_BHTD: Tensor,
    w_sink: int,
    w_recent: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_PRTD, k_PKD, v_PKD = _by_group(q_BHTD, k_BGKD, v_BGKD, scaling)
    d_out_PRTD = d_out_BHTD.reshape(*q_PRTD.shape[:3], d_out_BHTD.shape[3])
    d_q_PRTD = torch.empty_like(q_PRTD, dtype=q_BHTD.dtype)
    # Several blocks add to the same keys.
    d_k_PKD, d_v_PKD = (torch.zeros_like(x, dtype=_precise(x.dtype)) for x in (k_PKD, v_PKD))
    work = _Workspace(q_PRTD, k_PKD.shape[1], w_sink, w_recent, sinks_H)
    for block in work.blocks():
        q, d_out, k, v = block.rows(q_PRTD), block.rows(d_out_PRTD), block.span(k_PKD), block.span(v_PKD)
        probabilities = work.probabilities(block, q, k)
        block.add_span(torch.bmm(probabilities.transpose(1, 2), d_out), d_v_PKD)
        d_scores = work.d_scores(probabilities, d_out, v)
        block.add_span(torch.bmm(d_scores.transpose(1, 2), q), d_k_PKD)
        block.put_rows(torch.bmm(d_scores, k).mul_(scaling), d_q_PRTD)
    d_k_PKD, d_v_PKD = d_k_PKD.to(k_BGKD.dtype), d_v_PKD.to(v_BGKD.dtype)
    return d_q_PRTD.view_as(q_BHTD), d_k_PKD.view_as(k_BGKD), d_v_PKD.view_as(v_BGKD)


def _by_group(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """q_PRTD, the query heads that share keys side by side, scaled and in fp32 or better; k_PKD, v_PKD."""
    batch, heads, length, size = q_BHTD.shape
    groups = k_BGKD.shape[1]
    q_PRTD = (q_BHTD.to(_precise(q_BHTD.dtype)) * scaling).reshape(batch * groups, heads // groups, length, size)
    return q_PRTD.contiguous(), k_BGKD.flatten(0, 1), v_BGKD.flatten(0, 1)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype that blocks are computed in."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Block:
    """The queries from `start` to `end` of some groups of heads, and their keys: the first `sinks`, and `first` to `end`.

    Attributes:
        place: the same queries, counted from the first one.
    """

    groups: slice
    place: slice
    start: int
    end: int
    sinks: int
    first: int

    def rows(self, x_PRTD: Tensor) -> Tensor:
        """The block's queries, or the output or gradient of them: [N, RQ, D], fp32 or better."""
        return x_PRTD[self.groups, :, self.place].flatten(1, 2).to(_precise(x_PRTD.dtype))

    def put_rows(self, rows: Tensor, x_PRTD: Tensor) -> None:
        own = x_PRTD[self.groups, :, self.place]
        own.copy_(rows.view_as(own))

    def span(self, x_PKD: Tensor) -> Tensor:
        """The block's keys, or values: [N, S, D], fp32 or better. A small copy, except where the window still reaches the sinks."""
        precise = _precise(x_PKD.dtype)
        if self.first == self.sinks:
            return x_PKD[self.groups, : self.end].to(precise)
        return torch.cat([x_PKD[self.groups, : self.sinks], x_PKD[self.groups, self.first : self.end]], dim=1).to(precise)

    def add_span(self, span: Tensor, x_PKD: Tensor) -> None:
        x_PKD[self.groups, : self.sinks] += span[:, : self.sinks]
        x_PKD[self.groups, self.first : self.end] += span[:, self.sinks :]


class _Workspace:
    """The blocks of one pass, and the memory that they reuse for scores and probabilities.

    Attributes:
        on_sink_PRT: with learned sinks, the probability that each query of the blocks so far leaves to its sink.
    """

    def __init__(self, q_PRTD: Tensor, length: int, w_sink: int, w_recent: int, sinks_H: Tensor | None) -> None:
        """length: of the keys."""
        self.groups, repeats, tokens, _ = q_PRTD.shape
        self.length, self.before = length, length - tokens
        self.w_sink, self.w_recent = w_sink, w_recent
        on_cpu = q_PRTD.device.type == "cpu"
        rows, scores = (_ROWS_ON_CPU, _SCORES_ON_CPU) if on_cpu else (_ROWS_ELSEWHERE, _SCORES_ELSEWHERE)
        self.queries = min(max(rows // repeats, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        per_group = repeats * self.queries * min(w_sink + w_recent - 1 + self.queries, self.length)
        self.at_a_time = max(min(scores // per_group, self.groups), 1)
        self.memory = q_PRTD.new_empty(2, self.at_a_time * per_group, dtype=_precise(q_PRTD.dtype))
        self.position_K = torch.arange(self.length, device=q_PRTD.device)
        self.corners: dict[tuple[int, ...], Tensor] = {}
        self.sinks_PR1 = self.on_sink_PRT = None
        if sinks_H is not None:
            self.sinks_PR1 = sinks_H.view(-1, repeats).repeat(self.groups * repeats // sinks_H.numel(), 1)[..., None]
            self.on_sink_PRT = q_PRTD.new_empty(q_PRTD.shape[:3], dtype=self.memory.dtype)

    def blocks(self) -> Iterator[_Block]:
        for group in range(0, self.groups, self.at_a_time):
            groups = slice(group, group + self.at_a_time)
            for start in range(self.before, self.length, self.queries):
                end = min(start + self.queries, self.length)
                sinks, place = min(self.w_sink, end), slice(start - self.before, end - self.before)
                yield _Block(groups, place, start, end, sinks, max(sinks, start - self.w_recent + 1))

    def probabilities(self, block: _Block, q: Tensor, k: Tensor) -> Tensor:
        """The softmax over the keys that the block's queries see: [N, RQ, D], [N, S, D] -> [N, RQ, S]."""
        scores, probabilities = (x[: q.shape[0] * q.shape[1] * k.shape[1]].view(*q.shape[:2], -1) for x in self.memory)
        torch.bmm(q, k.transpose(1, 2), out=scores)
        scores_NRQS = scores.unflatten(1, (-1, block.end - block.start))
        after_QQ = self._hidden_after(block)
        scores_NRQS[..., -after_QQ.shape[1] :] += after_QQ
        left_QC = self._hidden_behind(block)
        if left_QC is not None:
            scores_NRQS[..., block.sinks : block.sinks + left_QC.shape[1]] += left_QC
        torch.softmax(scores, -1, out=probabilities)
        if self.sinks_PR1 is not None and self.on_sink_PRT is not None:
            lse_NRQ = (scores.amax(-1) - probabilities.amax(-1).log()).unflatten(1, scores_NRQS.shape[1:3])
            to_sink_NRQ = torch.sigmoid(self.sinks_PR1[block.groups] - lse_NRQ)
            self.on_sink_PRT[block.groups, :, block.place] = to_sink_NRQ
            probabilities.mul_(1 - to_sink_NRQ.flatten(1)[..., None])
        return probabilities

    def d_scores(self, probabilities: Tensor, d_out: Tensor, v: Tensor) -> Tensor:
        """The gradient through the values and the softmax, P * (dP - sum(P * dP)): [N, RQ, S]; it overwrites the scores."""
        d_probabilities = self.memory[0, : probabilities.numel()].view_as(probabilities)
        torch.bmm(d_out, v.transpose(1, 2), out=d_probabilities)
        return torch.ops.aten._softmax_backward_data.out(
            d_probabilities, probabilities, -1, probabilities.dtype, grad_input=d_probabilities
        )

    def _hidden_after(self, block: _Block) -> Tensor:
        """The mask of the corner of the block's own keys: [Q, Q]."""
        size = block.end - block.start
        if (size,) not in self.corners:
            position = self.position_K[:size]
            self.corners[(size,)] = self._bias(full_visible(position[:, None], position))
        return self.corners[(size,)]

    def _hidden_behind(self, block: _Block) -> Tensor | None:
        """The mask of the corner of keys before the window of some of the block's queries: [Q, C]. Most blocks have the same."""
        left = block.end - self.w_recent - block.first
        if left <= 0:
            return None
        kind = (block.end - block.start, block.first - block.start, left)
        if kind not in self.corners:
            q_positions = self.position_K[block.start : block.end, None]
            k_positions = self.position_K[block.first : block.first + left]
            self.corners[kind] = self._bias(streaming_visible(q_positions, k_positions, 0, self.w_recent))
        return self.corners[kind]

    def _bias(self, visible: Tensor) -> Tensor:
        """0 where visible, else -inf."""
        return torch.zeros(visible.shape, dtype=self.memory.dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
