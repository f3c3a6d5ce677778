import os
from pathlib import Path

import pytest

# Small tensors on few cores: threads would cost more than they bring, and tests run beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED_DATA = Path(os.environ.get("LT_TRAIN_SHARED_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark files and traces that are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}: set LT_TRAIN_SHARED_DATA to the folder that holds aime24.jsonl")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: two processes then end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_whole_path.py")
