import pytest
from transformers import PreTrainedConfig

from tests.support.families import BASES, CORE, FAMILIES, base_of


@pytest.fixture(params=FAMILIES)
def base_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return base_of(request.param)


@pytest.fixture(params=CORE)
def core_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return base_of(request.param)


@pytest.fixture
def qwen3_config() -> PreTrainedConfig:
    return BASES["qwen3"]
