"""Strategy `reach`: the rise of `nll`, taken over long-reach tokens alone.

Most answer tokens do not need the distant context, and in a mean over all tokens they hide the rise of those that do. Long-reach
tokens are the fraction of a sample's answer tokens whose loss rises most when every layer streams.
"""

import math
from decimal import Decimal

from torch import Tensor

from lt_train.selection.token_losses import TokenLosses


def long_reach_tokens(losses: TokenLosses, fraction: float) -> Tensor:
    """Indices, ascending, of the `ceil(fraction * A)` answer tokens whose loss rises most; the earlier of equal ones."""
    rise_A = losses.all_streaming_A - losses.full_A
    # Decimal, because the binary float 0.1 * 30 is a little more than 3.
    count = math.ceil(Decimal(str(fraction)) * rise_A.numel())
    return rise_A.argsort(descending=True, stable=True)[:count].sort().values


def reach_rise(losses: TokenLosses, fraction: float) -> tuple[list[float], float]:
    """Rise of the mean loss over one sample's long-reach tokens, in nats: for each layer streaming alone, and for all.

    `fraction` in (0, 1] is the recipe's `hybrid.calibration.long_reach_fraction`.
    """
    tokens = long_reach_tokens(losses, fraction)
    rise_L = (losses.one_streaming_LA - losses.full_A)[:, tokens].double().mean(dim=1)
    return rise_L.tolist(), (losses.all_streaming_A - losses.full_A)[tokens].double().mean().item()
