"""What vLLM's plugin refuses. What it serves is tested with a real server, in inference/servers/test_real_servers.py."""

import pytest
from transformers import Qwen2Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.checks import FAMILIES, check_served, check_version
from tests.support.families import BASES, SIZES, on_base


def test_another_version_of_vllm_is_refused_unless_it_is_allowed():
    check_version("0.32.0", None)
    check_version("0.33.1", "1")
    for version in ("0.33.1", "0.3.2", "1.32.0"):
        with pytest.raises(ValueError, match=rf"vLLM {version}: .*Fix: install vllm==0\.32\.0, or set LT_TRAIN_ANY_VLLM=1"):
            check_version(version, None)


def test_sink_tokens_are_refused_and_other_exports_are_not():
    for spec in (HybridSpec(4, (1,), 0, 8), HybridSpec(4, (1,), 0, 8, learned_sinks=True)):
        check_served(build_hybrid(BASES["qwen3"], spec).config)
    with pytest.raises(ValueError, match=r"w_sink: 4: vLLM's attention kernels know no sink tokens.*Fix: convert"):
        check_served(build_hybrid(BASES["qwen3"], HybridSpec(4, (1,), 4, 8)).config)


@pytest.mark.parametrize("w_sink", [0, 4])
def test_split_layers_are_refused_with_what_can_serve_them(w_sink):
    spec = HybridSpec(4, (1,), w_sink, 8, split_layers=((2, (0,)),))
    with pytest.raises(ValueError, match=r"streaming_kv_heads: single KV heads .* Fix: convert by entire layers .* lt-train serve"):
        check_served(build_hybrid(BASES["qwen3"], spec).config)


@pytest.mark.parametrize("family", sorted(BASES.keys() - set(FAMILIES)))
def test_a_family_that_the_plugin_was_not_written_for_is_refused(family):
    with pytest.raises(ValueError, match=f"model_type: lt_hybrid_{family}: .*qwen3.* Fix: evaluate .* built-in engine"):
        check_served(build_hybrid(BASES[family], on_base(BASES[family], HybridSpec(4, (1,), 0, 8))).config)


def test_windows_of_two_sizes_are_refused_with_what_can_serve_them():
    types = ["sliding_attention", *["full_attention"] * 3]
    base = Qwen2Config(**SIZES, layer_types=types, sliding_window=9, use_sliding_window=True)
    with pytest.raises(ValueError, match=r"w_recent: 8: some layers have a window of 9 tokens in the base .* lt-train serve"):
        check_served(build_hybrid(base, on_base(base, HybridSpec(4, (1,), 0, 8))).config)
