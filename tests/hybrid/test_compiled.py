"""torch.compile takes the numbers in a spec for variables where shapes are dynamic: it finds none of these by `in`, and compares
no tuples of them."""

from dataclasses import fields, replace

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


def changed_by(x: Tensor, first: HybridSpec, second: HybridSpec) -> Tensor:
    return x + int(first != second)


def test_a_spec_equals_one_of_the_same_numbers_alone_in_a_graph_of_dynamic_shapes() -> None:
    changes = dict(num_layers=6, lazy_layers=(0,), w_sink=3, w_recent=7, sliding_layers=(4,), sliding_window=9)
    others = [replace(SPEC, **{name: value}) for name, value in changes.items()]
    others += [replace(SPEC, split_layers=((3, (1,)),)), replace(SPEC, w_sink=0, split_layers=(), learned_sinks=True)]
    assert {*changes, "split_layers", "learned_sinks"} == {each.name for each in fields(HybridSpec)}
    compiled = torch.compile(changed_by, dynamic=True, backend="eager")
    assert [compiled(torch.zeros(1), SPEC, other).item() for other in others] == [1] * len(others)
    assert compiled(torch.zeros(1), SPEC, replace(SPEC)).item() == 0 and hash(SPEC) == hash(replace(SPEC))
