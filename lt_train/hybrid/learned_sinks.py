"""Learned sinks: a logit for each query head in the softmax's denominator, whose value is zero (as in gpt-oss, arXiv 2508.10925).

A hybrid with `learned_sinks` has them in its streaming layers. A base that has them, in all layers, keeps them in every hybrid.

A softmax over keys of log-sum-exp L becomes one with the sink s by the factor exp(L) / (exp(L) + exp(s)) = sigmoid(L - s) on its
output, and L becomes logaddexp(L, s). So every attention that knows its log-sum-exps can have them.

Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, D head size.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .spec import HybridSpec


class LearnedSinks(nn.Module):
    """The sink logits of one layer: `weight` [H]. Before they are fitted they are 0, a key that no query likes or dislikes."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self, q_BHQD: Tensor) -> Tensor:
        """sinks_H in the precision in which attention to these queries is computed: fp32 or better.

        A copy, because ZeRO-3 frees the parameter after this call.
        """
        return self.weight.to(q_BHQD.device, torch.promote_types(q_BHQD.dtype, torch.float32), copy=True)


def sinks_of(module: nn.Module, spec: HybridSpec, q_BHQD: Tensor) -> Tensor | None:
    """The sink logits [H] of a streaming layer's attention module: the hybrid's or the base's; None where neither has any."""
    return module.sinks(q_BHQD) if spec.learned_sinks else sinks_of_base(module, q_BHQD)


def sinks_of_base(module: nn.Module, q_BHQD: Tensor) -> Tensor | None:
    """The sink logits [H] that an attention module has in the base, in fp32 or better; None where it has none."""
    sinks_H = getattr(module, "sinks", None)
    if not isinstance(sinks_H, nn.Parameter):
        return None
    return sinks_H.to(q_BHQD.device, torch.promote_types(q_BHQD.dtype, torch.float32), copy=True)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities of the keys, the last dimension of `scores`; with sinks they add up to less than one.

    Args:
        sinks: logits, to be broadcast over all dimensions of `scores` but the last.
    """
    if sinks is None:
        return scores.softmax(dim=-1)
    sink_scores = sinks[..., None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink_scores], dim=-1).softmax(dim=-1)[..., :-1]


def sdpa_with_sinks(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, visible_BQK: Tensor | None, sinks_H: Tensor, scaling: float
) -> Tensor:
    """Attention by torch's own kernel, to one more key: it is zero, so that its score is the bias that the mask gives it.

    Args:
        visible_BQK: which keys each query sees; None: all.

    Returns:
        out_BHQD.
    """
    batch, heads, queries = q_BHQD.shape[:3]
    shape = (batch, heads, queries, k_BGKD.shape[2])
    bias_BHQK = q_BHQD.new_zeros(shape)
    if visible_BQK is not None:
        bias_BHQK = bias_BHQK.masked_fill(~visible_BQK[:, None].to(q_BHQD.device), float("-inf"))
    sinks_BHQ1 = sinks_H[:, None, None].to(q_BHQD.dtype).expand(batch, -1, queries, 1)
    k_BGKD, v_BGKD = (pad(x, (0, 0, 0, 1)) for x in (k_BGKD, v_BGKD))
    return scaled_dot_product_attention(
        q_BHQD,
        k_BGKD,
        v_BGKD,
        attn_mask=torch.cat([bias_BHQK, sinks_BHQ1], dim=-1),
        scale=scaling,
        enable_gqa=heads != k_BGKD.shape[1],
    )
