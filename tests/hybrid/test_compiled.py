"""torch.compile takes the numbers in a spec for variables where shapes are dynamic, and finds none of these by `in`."""

import torch
from torch import Tensor

from lt_train.hybrid.spec import HybridSpec

SPEC = HybridSpec(5, (0, 2), 2, 6, split_layers=((3, (0, 1)),), sliding_layers=(1,), sliding_window=8)


def kinds_of_layers(x: Tensor, spec: HybridSpec) -> Tensor:
    kinds = ((spec.is_lazy(layer), spec.slides(layer), len(spec.split_heads(layer))) for layer in range(5))
    return torch.stack([x + sum(10**place * int(found) for place, found in enumerate(kind)) for kind in kinds])


def test_each_layer_is_of_its_kind_in_a_graph_of_dynamic_shapes() -> None:
    compiled = torch.compile(kinds_of_layers, dynamic=True, backend="eager")
    assert compiled(torch.zeros(1), SPEC).flatten().tolist() == [1, 10, 1, 200, 0]
