"""Strategy `lazy_ratio`, the paper's: the attention mass of a sample's last queries on sinks and recent tokens.

LightTransfer (arXiv 2410.13846), Eq. 1, with question and answer as input as in LightTransfer-Train.

Shapes: B = 1, H query heads, G key/value heads, T tokens, K keys, D head size, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lt_train.hybrid.learned_sinks import sinks_of_base
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import FullView
from lt_train.inference.fused_attention import full_attention
from lt_train.inference.lazy_ratio import lazy_ratio
from lt_train.inference.observed_layers import run_observed
from lt_train.selection.fingerprint import Sizes


def lazy_ratios(model: HybridForCausalLM, input_ids: Sequence[int], sizes: Sizes) -> list[float]:
    """Lazy ratio of each layer that can stream for one sample, while none does: in (0, 1]; 1: no attention on other tokens.

    `model` is a hybrid in evaluation mode; its own lazy layers do not matter. For a sample shorter than `sizes.w_last`, all its
    queries count.
    """
    views = run_observed(model, input_ids, lambda _, full: ObservedView(full.documents, full.kernel, sizes=sizes))
    return [view.lazy_ratio for view in views]


@dataclass
class ObservedView(FullView):
    """Full attention that also computes the lazy ratio of the layer."""

    sizes: Sizes = field(kw_only=True)
    lazy_ratio: float = math.nan

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        sizes, sinks_H = self.sizes, sinks_of_base(module, q_BHTD)
        out_BTHD, (lse_BHT,) = full_attention(self, module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)
        self.lazy_ratio = lazy_ratio(q_BHTD, k_BGKD, scaling, sizes.w_sink, sizes.w_recent, sizes.w_last, sinks_H, lse_BHT)
        return out_BTHD
