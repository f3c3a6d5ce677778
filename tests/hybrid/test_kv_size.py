"""The bytes of a KV cache, counted by hand: 2 key heads of 16 are 2 x 2 x 16 elements a token and layer."""

import subprocess
import sys

import pytest

from lt_train.hybrid.kv_size import kv_bytes, saved_itemsize, token_bytes
from lt_train.hybrid.spec import HybridSpec

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 16}
SPEC = HybridSpec(num_layers=5, lazy_layers=(1, 3), w_sink=4, w_recent=12)


def test_a_token_has_a_key_and_a_value_for_each_key_head():
    assert token_bytes(CONFIG, itemsize=4) == 2 * 2 * 16 * 4
    assert token_bytes(CONFIG | {"head_dim": None}, itemsize=2) == 2 * 2 * 12 * 2
    assert token_bytes({"num_attention_heads": 4, "hidden_size": 48}, itemsize=1) == 2 * 4 * 12


@pytest.mark.parametrize(("tokens", "cached_by_streaming_layers"), [(10, 10), (16, 16), (17, 16), (100, 16)])
def test_streaming_layers_hold_their_window_and_the_base_holds_all(tokens, cached_by_streaming_layers):
    assert kv_bytes(CONFIG, SPEC, tokens, itemsize=4) == 256 * (3 * tokens + 2 * cached_by_streaming_layers)
    assert kv_bytes(CONFIG, SPEC.all_full, tokens, itemsize=4) == 256 * 5 * tokens


def test_each_kv_head_of_a_split_layer_holds_what_it_sees():
    spec = HybridSpec.from_streaming_heads([(), (1,), (0, 1)], kv_heads=2, w_sink=4, w_recent=12)
    assert (spec.lazy_layers, spec.split_layers) == ((2,), ((1, (1,)),))
    assert kv_bytes(CONFIG, spec, tokens=100, itemsize=4) == 128 * (3 * 100 + 3 * 16)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), (None, 4), ("bfloat16", 2), ("float16", 2)])
def test_a_config_without_a_dtype_is_fp32(dtype, itemsize):
    assert saved_itemsize({"dtype": dtype}) == itemsize
    assert saved_itemsize({}) == 4


def test_kv_sizes_load_no_torch():
    code = "import sys, lt_train.hybrid.kv_size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
