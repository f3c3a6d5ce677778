import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.selection.periodic import periodic_layers

budgets = st.integers(2, 100).flatmap(lambda layers: st.tuples(st.integers(1, layers - 1), st.just(layers)))


@given(budgets)
def test_exactly_the_requested_number_of_layers_streams_and_the_last_is_full(budget):
    n_layers, num_layers = budget
    chosen = periodic_layers(n_layers, num_layers)
    assert len(set(chosen)) == n_layers
    assert list(chosen) == sorted(chosen)
    assert all(0 <= layer < num_layers - 1 for layer in chosen)


@given(budgets)
def test_gaps_between_full_layers_differ_by_one_at_most(budget):
    n_layers, num_layers = budget
    full = sorted(set(range(num_layers)) - set(periodic_layers(n_layers, num_layers)))
    gaps = [after - before for before, after in zip([-1, *full], full, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("n_layers", "num_layers", "chosen"),
    [(4, 8, (0, 2, 4, 6)), (6, 8, (0, 1, 2, 4, 5, 6)), (2, 8, (2, 6)), (1, 2, (0,))],
)
def test_streaming_layers_come_first_in_each_period(n_layers, num_layers, chosen):
    assert periodic_layers(n_layers, num_layers) == chosen
