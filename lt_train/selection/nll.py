"""Strategy `nll`: a layer's score is the rise of the answer's loss when this layer alone streams and the others stay full.

After NLL-guided selection (arXiv 2606.27791).
"""

from lt_train.selection.token_losses import TokenLosses


def nll_rise(losses: TokenLosses) -> tuple[list[float], float]:
    """Rise of one sample's mean answer-token loss, in nats: for each layer streaming alone, and for all streaming."""
    rise_L = (losses.one_streaming_LA - losses.full_A).double().mean(dim=1)
    return rise_L.tolist(), (losses.all_streaming_A - losses.full_A).double().mean().item()
