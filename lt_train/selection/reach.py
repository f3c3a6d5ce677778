"""Strategy `reach`: the rise of `nll`, taken over long-reach tokens alone.

Most answer tokens do not need the distant context, and in a mean over all tokens they hide the rise of those that do. Long-reach
tokens are the fraction of a sample's answer tokens whose loss rises most when every layer streams.
"""

import math
from decimal import Decimal

from torch import Tensor

from lt_train.selection.token_losses import EndpointLosses, TokenLosses


def long_reach_tokens(losses: EndpointLosses, fraction: float) -> Tensor:
    """Indices, ascending, of the `ceil(fraction * A)` answer tokens whose loss rises most; the earlier of equal ones."""
    rise_A = losses.all_streaming_A - losses.full_A
    # Decimal, because the binary float 0.1 * 30 is a little more than 3.
    count = math.ceil(Decimal(str(fraction)) * rise_A.numel())
    return rise_A.argsort(descending=True, stable=True)[:count].sort().values


def reach_rise(losses: TokenLosses, fraction: float) -> tuple[list[float], float]:
    """`TokenLosses.rise` over the long-reach tokens of one sample.

    `fraction` in (0, 1] is the recipe's `hybrid.calibration.long_reach_fraction`.
    """
    return losses.rise(long_reach_tokens(losses, fraction))
