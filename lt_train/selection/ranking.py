"""Which layers, or KV heads, the scores of all samples choose."""

import math
from collections import Counter
from collections.abc import Sequence


def smallest_rise(scores: Sequence[Sequence[float]], n_layers: int) -> tuple[int, ...]:
    """The `n_layers` layers whose rise, averaged over samples, is smallest; ties go to the lower layer.

    `scores[sample][layer]`. The sums are exact (`math.fsum`), so the order of the samples does not matter.
    """
    mean_L = [math.fsum(column) / len(column) for column in zip(*scores, strict=True)]
    ranked = sorted(range(len(mean_L)), key=lambda layer: (mean_L[layer], layer))
    return tuple(sorted(ranked[:n_layers]))


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
