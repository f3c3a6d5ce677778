"""What vLLM's plugin refuses. What it serves is tested with a real server, in test_in_vllm.py."""

from dataclasses import replace

import pytest
from transformers import Qwen2Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.vllm_plugin.checks import FAMILIES, Settings, check_served, check_settings, check_version
from tests.support.families import BASES, SIZES, on_base


def test_another_version_of_vllm_is_refused_unless_it_is_allowed():
    check_version("0.32.0", None)
    check_version("0.33.1", "1")
    for version in ("0.33.1", "0.3.2", "1.32.0"):
        with pytest.raises(ValueError, match=rf"vLLM {version}: .*Fix: install vllm==0\.32\.0, or set LT_TRAIN_ANY_VLLM=1"):
            check_version(version, None)


SINK_TOKENS = HybridSpec(4, (1,), 4, 8)
SPLIT = HybridSpec(4, (1,), 0, 8, split_layers=((2, (0,)),))
OTHERS = HybridSpec(4, (1,), 0, 8), HybridSpec(4, (1,), 0, 8, learned_sinks=True)


@pytest.mark.parametrize("spec", [SINK_TOKENS, SPLIT, replace(SPLIT, w_sink=4), *OTHERS])
def test_every_kind_of_export_is_served(spec):
    check_served(build_hybrid(BASES["qwen3"], spec).config)
    for platform in ("cpu", "gpu"):
        check_settings(spec, Settings(platform))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"platform": "other"}, "device: with sink tokens"),
        ({"kv_dtype": "fp8"}, "kv_cache_dtype: fp8: .* Fix: set it to auto"),
        ({"frees_outside_window": False}, "disable_hybrid_kv_cache_manager: .* Fix: remove"),
        ({"transfers_kv": True}, "kv_transfer_config: .* Fix: remove"),
        ({"speculates": True}, "speculative_config: .* Fix: remove"),
    ],
)
def test_settings_that_were_not_written_for_sink_tokens_are_refused_with_these_alone(changed, message):
    settings = replace(Settings(), **changed)
    for spec in (SINK_TOKENS, replace(SPLIT, w_sink=4)):
        with pytest.raises(ValueError, match=message):
            check_settings(spec, settings)
    for spec in (*OTHERS, SPLIT):
        check_settings(spec, settings)


def test_split_layers_over_several_processes_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel_size: 2: single KV heads .* Fix: remove the setting, and start several"):
        check_settings(SPLIT, Settings(tensor_parallel=2))
    for spec in (*OTHERS, SINK_TOKENS):
        check_settings(spec, Settings(tensor_parallel=2))


@pytest.mark.parametrize("family", sorted(BASES.keys() - set(FAMILIES)))
def test_a_family_that_the_plugin_was_not_written_for_is_refused(family):
    with pytest.raises(ValueError, match=f"model_type: lt_hybrid_{family}: .*qwen3.* Fix: evaluate .* built-in engine"):
        check_served(build_hybrid(BASES[family], on_base(BASES[family], HybridSpec(4, (1,), 0, 8))).config)


def test_windows_of_two_sizes_are_refused_with_what_can_serve_them():
    types = ["sliding_attention", *["full_attention"] * 3]
    base = Qwen2Config(**SIZES, layer_types=types, sliding_window=9, use_sliding_window=True)
    with pytest.raises(ValueError, match=r"w_recent: 8: some layers have a window of 9 tokens in the base .* lt-train serve"):
        check_served(build_hybrid(base, on_base(base, HybridSpec(4, (1,), 0, 8))).config)
