"""Strategy `lazy_ratio`, the paper's: the attention mass of a sample's last queries on sinks and recent tokens.

LightTransfer (arXiv 2410.13846), Eq. 1, with question and answer as input as in LightTransfer-Train. Only the
[w_last, T] logits of one group of query heads are in memory at a time, and two log-sum-exps over them give the ratio.

Shapes: B = 1, H query heads, G key/value heads, R = H / G, W last queries, T tokens, D head size, L layers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lt_train.hybrid.mask import full_visible, streaming_visible
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import FullView
from lt_train.inference.observed_layers import run_observed
from lt_train.selection.fingerprint import Sizes


def lazy_ratios(model: HybridForCausalLM, input_ids: Sequence[int], sizes: Sizes) -> list[float]:
    """Lazy ratio of each layer for one sample, with every layer full: in (0, 1]; 1: no attention on other tokens.

    `model` is a hybrid in evaluation mode; its own lazy layers do not matter. For a sample shorter than `sizes.w_last`, all its
    queries count.
    """
    views = run_observed(model, input_ids, lambda _, full: ObservedView(full.documents, full.kernel, sizes=sizes))
    return [view.lazy_ratio for view in views]


def most_often_lazy(ratios: Sequence[Sequence[float]], n_layers: int) -> tuple[int, ...]:
    """LightTransfer-Train's choice: the layers that are most often among the `n_layers` laziest layers of a sample.

    `ratios[sample][layer]`. Equal counts are ordered by the mean ratio, then by index; within a sample the lower of two
    equal layers comes first. The sums are exact (`math.fsum`), so the order of the samples does not matter.
    """
    layers = range(len(ratios[0]))
    votes: Counter[int] = Counter()
    for ratio_L in ratios:
        votes.update(
            sorted(layers, key=[-ratio for ratio in ratio_L].__getitem__)[:n_layers]
        )  # stable: the lower of equal layers first
    total_L = [math.fsum(column) for column in zip(*ratios, strict=True)]
    ranked = sorted(layers, key=lambda layer: (-votes[layer], -total_L[layer], layer))
    return tuple(sorted(ranked[:n_layers]))


@dataclass
class ObservedView(FullView):
    """Full attention that also computes the lazy ratio of the layer."""

    sizes: Sizes = field(kw_only=True)
    lazy_ratio: float = math.nan

    def attend(self, module: nn.Module, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scaling: float, dropout: float) -> Tensor:
        self.lazy_ratio = lazy_ratio(q_BHTD, k_BGKD, scaling, self.sizes)
        return super().attend(module, q_BHTD, k_BGKD, v_BGKD, scaling, dropout)


def lazy_ratio(q_BHTD: Tensor, k_BGTD: Tensor, scaling: float, sizes: Sizes) -> float:
    """Eq. 1 for one layer and one sample, averaged over heads and the last `w_last` queries.

    The ratio of a query is its attention probability on the keys that it would see if the layer streamed; so its recent
    keys are its own latest `w_recent`. Eq. 1 uses the input's last `w_recent` keys for all queries: the same for the
    last query, and up to `w_last - 1` keys fewer for the earlier ones.

    Args:
        q_BHTD, k_BGTD: queries and keys after rotary embedding, B = 1.
    """
    groups, length = k_BGTD.shape[1:3]
    position_T = torch.arange(length, device=k_BGTD.device)
    query_W1 = position_T[-sizes.w_last :, None]
    causal_WT = full_visible(query_W1, position_T)
    streaming_WT = streaming_visible(query_W1, position_T, sizes.w_sink, sizes.w_recent)
    q_GRWD = q_BHTD[0, :, -sizes.w_last :].unflatten(0, (groups, -1)).float()
    total = 0.0
    for q_RWD, k_TD in zip(q_GRWD, k_BGTD[0].float(), strict=True):
        logits_RWT = scaling * (q_RWD @ k_TD.T)
        log_ratio_RW = _log_sum_exp(logits_RWT, streaming_WT) - _log_sum_exp(logits_RWT, causal_WT)
        # Eq. 1 averages probabilities over heads, not their logarithms.
        total += log_ratio_RW.exp().double().sum().item()
    return total / (q_BHTD.shape[1] * query_W1.shape[0])


def _log_sum_exp(logits_RWT: Tensor, visible_WT: Tensor) -> Tensor:
    return logits_RWT.masked_fill(~visible_WT, float("-inf")).logsumexp(dim=-1)
