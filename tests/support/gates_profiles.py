"""Layer profiles by gates with given shares of their KV heads."""

from math import fsum

from lt_train.selection.fingerprint import Fingerprint, Sizes
from lt_train.selection.profile import LayerProfile, SampleScores


def profile_of(heads: list[list[list[float]]]) -> LayerProfile:
    """heads[sample][layer][kv_head]; a window of 1,024 tokens, a thirty-second of the sequence whose cache is counted."""
    samples = tuple(
        SampleScores(
            id=str(number),
            tokens=2000,
            scores={"gates": tuple(fsum(head_G) for head_G in head_LG)},
            all_streaming={"gates": 1.5},
            head_shares=tuple(map(tuple, head_LG)),
        )
        for number, head_LG in enumerate(heads)
    )
    made_from = Fingerprint("tiny", "", "", "float32", "", Sizes(4, 1020, 64, 0.1), ("gates",), {})
    return LayerProfile(made_from, len(heads[0]), samples, (), "")


HEADS = [[[0.9, 0.0], [0.1, 0.1], [0.3, 0.0]], [[0.7, 0.0], [0.1, 0.1], [0.5, 0.0]]]
"""Layers have shares of 0.8, 0.2 and 0.4 on average."""
