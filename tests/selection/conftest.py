"""Tiny models whose attention is far from even, as a stock model and as a hybrid with the same weights."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lt_train.dataset.examples import Example
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Calibration, Hybrid
from tests.support.families import base_of, on_base

LAYERS, VOCABULARY = 4, 64
# Weights ten times as wide as usual, so that heads look at single keys and layers matter to the loss.
_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
    initializer_range=0.25,
    tie_word_embeddings=False,
    pad_token_id=None,  # samples hold every id
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def family() -> str:
    """Tests of the mathematics parametrize this with more families."""
    return "qwen3"


@pytest.fixture
def base_config(family) -> PreTrainedConfig:
    return type(base_of(family))(**base_of(family).to_dict() | _SHAPE)


@pytest.fixture
def stock_model(base_config):
    """transformers' own model, which hands out its attention weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(base_config, attn_implementation="eager").eval()


@pytest.fixture
def hybrid_of(stock_model, base_config) -> Callable[..., HybridForCausalLM]:
    """hybrid_of(lazy_layers, w_sink, w_recent): a hybrid with the stock model's weights."""

    def build(lazy_layers: tuple[int, ...] = (), w_sink: int = 2, w_recent: int = 6) -> HybridForCausalLM:
        model = build_hybrid(base_config, on_base(base_config, HybridSpec(LAYERS, lazy_layers, w_sink, w_recent)))
        model.load_state_dict(stock_model.state_dict())
        return model.eval()

    return build


@pytest.fixture
def example_of() -> Callable[..., Example]:
    """example_of(seed, tokens): a sample of random tokens, a third of it prompt."""

    def build(seed: int, tokens: int = 40) -> Example:
        ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
        prompt = tokens // 3
        return Example(f"sample-{seed}", f"data.jsonl:{seed}", tuple(ids[:prompt]), tuple(ids[prompt:]))

    return build


@pytest.fixture
def hybrid_part() -> Hybrid:
    """What the recipe's hybrid part says, in the sizes of `hybrid_of`."""
    return Hybrid(lazy_layer_ratio=0.5, w_sink=2, w_recent=6, calibration=Calibration(w_last=8, long_reach_fraction=0.1))
