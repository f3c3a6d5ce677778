"""Full causal attention on a CPU by torch's fused kernel, which returns the log-sum-exps that `scaled_dot_product_attention` drops.

With them attention can be computed in parts: keys that all queries see without a mask, of which the kernel computes every pair.

Shapes: B rows, H query heads, G key/value heads, T tokens with queries, the last of K tokens, D head size.
"""

import torch
from torch import Tensor, nn

from lt_train.hybrid.attention_kernels import computed_in, kernel_for
from lt_train.hybrid.learned_sinks import sinks_of_base
from lt_train.hybrid.views import FullView


def later_tokens_attention(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, sinks_H: Tensor | None) -> Tensor:
    """Full attention of the last T of K tokens to all before them: to the earlier keys and to their own, joined. Returns out_BHTD.

    Args:
        q_BHTD: on a CPU, without gradients.
        sinks_H: learned sinks, in fp32 or better.
    """
    earlier = k_BGKD.shape[2] - q_BHTD.shape[2]
    (k_earlier, k_own), (v_earlier, v_own) = (x.tensor_split([earlier], dim=2) for x in (k_BGKD, v_BGKD))
    out_BHTD, lse_BHT = _fused(q_BHTD, k_earlier, v_earlier, scaling, causal=False)
    own_BHTD, own_lse_BHT = _fused(q_BHTD, k_own, v_own, scaling, causal=True)
    precise = lse_BHT.dtype
    joined_BHTD = own_BHTD.to(precise).lerp(out_BHTD.to(precise), (lse_BHT - own_lse_BHT).sigmoid().unsqueeze(-1))
    if sinks_H is not None:
        joined_BHTD *= (lse_BHT.logaddexp(own_lse_BHT) - sinks_H[:, None]).sigmoid().unsqueeze(-1)
    return joined_BHTD.to(out_BHTD.dtype)


def full_attention(
    view: FullView, module: nn.Module, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scaling: float, dropout: float
) -> tuple[Tensor, list[Tensor | None]]:
    """The attention of `view`, and the log-sum-exps [1, H, T] of each of its documents.

    Returns:
        out_BTHD, and None for each document where another kernel computes it, or the documents do not fill one row.
    """
    dtype, lengths = computed_in(v_BGTD), view.documents.lengths
    other_kernel = q_BHTD.device.type != "cpu" or kernel_for(view.kernel, q_BHTD, dtype).full is not None
    if other_kernel or view.documents.shape != (1, sum(lengths)) or dropout or sinks_of_base(module, q_BHTD) is not None:
        return FullView.attend(view, module, q_BHTD, k_BGTD, v_BGTD, scaling, dropout), [None] * len(lengths)
    of_documents = zip(*(x.to(dtype).split(lengths, dim=2) for x in (q_BHTD, k_BGTD, v_BGTD)), strict=True)
    outs, lses = zip(*(_fused(q, k, v, scaling, causal=True) for q, k, v in of_documents), strict=True)
    return torch.cat(outs, dim=2).transpose(1, 2), list(lses)


def _fused(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out_BHTD, and lse_BHT in fp32 or better. torch's own operator: nothing public returns log-sum-exps on a CPU (2.13)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BGKD, v_BGKD, is_causal=causal, scale=scaling)
