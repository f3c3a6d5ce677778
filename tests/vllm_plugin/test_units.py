"""How KV heads are distributed over Attention layers of vLLM."""

from hypothesis import given
from hypothesis import strategies as st

from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.units import Unit, heads_of_a_unit, number_of_units, units_of_layer


def test_layers_that_stream_as_a_whole_are_one_unit_each() -> None:
    spec = HybridSpec(3, (1,), 4, 8)
    everything = (0, 1, 2, 3)
    assert [units_of_layer(spec, layer, 4) for layer in range(3)] == [[Unit(everything, layer == 1)] for layer in range(3)]


def test_units_are_as_large_as_the_split_layers_allow() -> None:
    spec = HybridSpec(3, (0,), 4, 8, split_layers=((2, (1, 6)),))
    assert heads_of_a_unit(spec, 8) == 2
    assert units_of_layer(spec, 2, 8) == [Unit(full, False) for full in ((0, 2), (3, 4), (5, 7))] + [Unit((1, 6), True)]
    assert number_of_units(spec, 8) == (7, 5)
    assert heads_of_a_unit(HybridSpec(3, (), 4, 8, split_layers=((0, (1, 6)), (2, (0, 1, 2)))), 8) == 1


@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4))
def test_every_head_is_in_one_unit_of_its_kind_and_all_units_are_equally_large(heads_L: list[set[int]]) -> None:
    spec = HybridSpec.from_streaming_heads(heads_L, 6, 4, 8)
    units_L = [units_of_layer(spec, layer, 6) for layer in range(spec.num_layers)]
    for streaming, units in zip(heads_L, units_L, strict=True):
        assert sorted(head for unit in units for head in unit.heads) == list(range(6))
        assert {head for unit in units if unit.streams for head in unit.heads} == streaming
        assert {len(unit.heads) for unit in units} == {heads_of_a_unit(spec, 6)}
    kinds = [unit.streams for units in units_L for unit in units]
    assert number_of_units(spec, 6) == (kinds.count(False), kinds.count(True))
