import pytest

from lt_train.bench import roofline
from lt_train.runtime.units import MIB


@pytest.fixture(autouse=True)
def rates_are_soon_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a cache holds: what is measured here is no machine."""
    monkeypatch.setitem(roofline.COPIED, "cpu", 4 * MIB)
    monkeypatch.setitem(roofline.MATRIX, "cpu", 256)
