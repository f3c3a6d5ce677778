"""The model that is evaluated and its tokenizer: imported where a test asks for them, for most tests here need neither."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lt_train.hybrid.modeling import HybridForCausalLM


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    from tests.support.symbol_model import symbol_tokenizer

    return symbol_tokenizer()


@pytest.fixture
def model() -> "HybridForCausalLM":
    from tests.support.symbol_model import symbol_hybrid

    return symbol_hybrid()
