"""Numbers in words."""

import pytest

from lt_train.report.figures import kilo, size


@pytest.mark.parametrize(
    ("count", "said"),
    [(12, "12 B"), (1024, "1 KiB"), (1020 * 2**20, "1,020 MiB"), (1.5 * 2**30, "1.5 GiB"), (999 * 2**10, "999 KiB")],
)
def test_sizes_are_said_in_the_unit_that_fits(count, said):
    assert size(count) == said


@pytest.mark.parametrize(
    ("tokens", "said"), [(0, "0"), (512, "512"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (131072, "128K")]
)
def test_lengths_are_said_in_k_of_1024(tokens, said):
    assert kilo(tokens) == said
