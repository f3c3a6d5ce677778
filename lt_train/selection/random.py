"""Strategy `random`: layers drawn by the recipe's seed, for comparison; the model is not scored."""

from random import Random


def random_layers(n_layers: int, num_layers: int, seed: int) -> tuple[int, ...]:
    """`n_layers` of `num_layers` layers, ascending, each set equally likely. A larger `n_layers` adds to a smaller one's layers."""
    order = list(range(num_layers))
    Random(seed).shuffle(order)
    return tuple(sorted(order[:n_layers]))
