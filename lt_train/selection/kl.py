"""Strategy `kl`: a layer's score is the divergence from the full model when this layer alone streams.

KL-guided selection (arXiv 2512.20569) restores one layer at a time to full attention; here one layer at a time streams.
"""

from lt_train.selection.token_losses import TokenDivergences


def mean_divergence(divergences: TokenDivergences) -> tuple[list[float], float]:
    """Mean KL(full || variant) over the answer tokens of one sample, in nats: each layer streaming alone, and all streaming."""
    divergence_L = divergences.one_streaming_LA.double().mean(dim=1)
    return divergence_L.tolist(), divergences.all_streaming_A.double().mean().item()
