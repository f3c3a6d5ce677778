"""Strategy `periodic`: streaming and full layers alternate; the model is not scored."""


def periodic_layers(n_layers: int, num_layers: int) -> tuple[int, ...]:
    """The `n_layers` of `num_layers` layers that stream when the full ones are spread evenly, ending with the last.

    With F full layers, the j-th of them (j = 1..F) is layer `floor(j * num_layers / F) - 1`. So streaming layers come
    first, as in published models with alternating layers (Gemma 3, gpt-oss): half of 8 leaves 1, 3, 5, 7 full, a
    quarter full leaves 3 and 7.
    """
    full = num_layers - n_layers
    kept = {j * num_layers // full - 1 for j in range(1, full + 1)}
    return tuple(layer for layer in range(num_layers) if layer not in kept)
