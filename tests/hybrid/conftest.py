import pytest


@pytest.fixture(params=["qwen2", "qwen3", "llama", "mistral"])
def base_config(request):
    from tests.support.families import BASES

    return BASES[request.param]


@pytest.fixture
def qwen3_config():
    from tests.support.families import BASES

    return BASES["qwen3"]
