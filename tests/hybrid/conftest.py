import pytest

from tests.support.families import BASES


@pytest.fixture(params=BASES)
def base_config(request):
    return BASES[request.param]


@pytest.fixture
def qwen3_config():
    return BASES["qwen3"]
