import pytest
from transformers import PreTrainedConfig

from tests.support.families import BASES


@pytest.fixture(params=BASES)
def base_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return BASES[request.param]


@pytest.fixture
def qwen3_config() -> PreTrainedConfig:
    return BASES["qwen3"]
