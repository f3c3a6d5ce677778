"""Strategy `nll`: a layer's score is the rise of the answer's loss when this layer alone streams and the others stay full.

After NLL-guided selection (arXiv 2606.27791).
"""

from lt_train.selection.token_losses import TokenLosses


def nll_rise(losses: TokenLosses) -> tuple[list[float], float]:
    """`TokenLosses.rise` over all answer tokens of one sample."""
    return losses.rise()
