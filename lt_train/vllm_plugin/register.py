"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`): our exports' configs and model class.

It runs in vLLM's own environment, whose pins differ from ours: beside vLLM and transformers it imports light modules of
lt_train.hybrid alone.
"""

from transformers import AutoConfig

from lt_train.hybrid.configuration import HybridMinistralConfig, HybridQwen2Config, HybridQwen3Config

CONFIGS = (HybridQwen2Config, HybridQwen3Config, HybridMinistralConfig)
ARCHITECTURES = ("HybridQwen2ForCausalLM", "HybridQwen3ForCausalLM", "HybridMinistralForCausalLM")
"""What `architectures` names in the exports that bring code of their own."""


def register() -> None:
    """Called several times in a process. The model class is imported when a model of ours is served, and not before."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY  # the only door for configs without remote code

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        _CONFIG_REGISTRY[config.model_type] = config
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "lt_train.vllm_plugin.model:HybridForCausalLM")
