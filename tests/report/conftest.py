from pathlib import Path

import pytest

from tests.support.made_runs import made_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    return made_run(tmp_path / "runs")
