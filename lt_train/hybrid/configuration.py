"""Configs of the hybrid classes: the base's own config with native `layer_types` and `sliding_window`, plus `w_sink`.

Of a base with sliding layers they keep its own `layer_types` and `sliding_window`, by which transformers chooses rotary embeddings,
and `streaming_kv_heads` and `w_recent` set what streams.

Each has a `model_type` of its own, so that software without sinks stops instead of ignoring them; and with learned sinks a
`hybrid_version` at which earlier code of ours stops.
"""

from dataclasses import replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.glm4.configuration_glm4 import Glm4Config
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo3.configuration_olmo3 import Olmo3Config
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config

from .spec import FULL, HYBRID_VERSION, STREAMING, HybridError, HybridSpec


@strict
class HybridConfig(PreTrainedConfig):
    """The settings that the configs of all families add. Mixed in before the family's config."""

    layer_types: list[str] | None = None
    sliding_window: int | None = 4096
    w_sink: int = 4
    learned_sinks: bool = False
    streaming_kv_heads: list[list[int]] | None = None
    """By layer, the KV heads that stream; None: the layers that `layer_types` names stream with all their heads."""
    w_recent: int | None = None
    """The window of what streams, where `layer_types` and `sliding_window` are the base's own; None: these set what streams."""
    hybrid_version: str = HYBRID_VERSION
    use_cache: bool = True

    base_has_sinks = False
    """Whether every layer of the base has learned sinks."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.layer_types is None:
            self.layer_types = [FULL] * self.num_hidden_layers
        self.check_hybrid()

    def check_hybrid(self) -> None:
        """Raises HybridError unless the fields describe a hybrid that this code computes."""
        assert self.layer_types is not None, "__post_init__ sets them"
        unknown = set(self.layer_types) - {FULL, STREAMING}
        if unknown:
            raise HybridError(f"layer_types: {sorted(unknown)}: unknown. Fix: name only {FULL} and {STREAMING}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise HybridError(
                f"layer_types: {len(self.layer_types)} layers, and num_hidden_layers is {self.num_hidden_layers}. "
                "Fix: name one type for each layer"
            )
        spec = self.spec  # HybridSpec checks the sizes
        if self.base_has_sinks and spec.learned_sinks:
            raise HybridError("learned_sinks: each layer of the base has some, which stay. Fix: set hybrid.sink to tokens")
        if self.base_has_sinks and spec.split_layers:
            raise HybridError(
                "split_layers: each query head of the base has a learned sink, and the kernels of split layers have none. "
                "Fix: let entire layers stream"
            )
        if self.layer_types != spec.layer_types:
            raise HybridError(
                f"streaming_kv_heads: they make {spec.layer_types.count(STREAMING)} layers stream with all their heads, and "
                f"layer_types names {self.layer_types.count(STREAMING)}, or others. Fix: set both to the same layers"
            )
        if self.hybrid_version != spec.version:
            raise HybridError(
                f"hybrid_version: {self.hybrid_version!r}: for learned_sinks {self.learned_sinks} this code computes version "
                f"{spec.version!r}. Fix: load the checkpoint with its own code (trust_remote_code=True), or with the version of "
                "lt_train that made it"
            )

    @property
    def spec(self) -> HybridSpec:
        assert self.layer_types is not None, "__post_init__ sets them"
        if self.sliding_window is None:
            raise HybridError("sliding_window: missing. Fix: set it to w_recent, the window of the streaming layers in tokens")
        if self.w_recent is not None:
            return self._spec_beside_sliding_layers(self.layer_types, self.sliding_window, self.w_recent)
        if self.streaming_kv_heads is None:
            return HybridSpec.from_layer_types(self.layer_types, self.w_sink, self.sliding_window, self.learned_sinks)
        spec = HybridSpec.from_streaming_heads(self.streaming_kv_heads, self.kv_heads, self.w_sink, self.sliding_window)
        return replace(spec, learned_sinks=self.learned_sinks)

    def _spec_beside_sliding_layers(self, layer_types: list[str], sliding_window: int, w_recent: int) -> HybridSpec:
        sliding = tuple(layer for layer, kind in enumerate(layer_types) if kind == STREAMING)
        if not sliding or self.streaming_kv_heads is None:
            lacks = "no layer with a window" if not sliding else "no streaming_kv_heads, which set what streams"
            raise HybridError(f"w_recent: {w_recent}: the config has {lacks}. Fix: restore the config.json that lt_train wrote")
        spec = HybridSpec.from_streaming_heads(self.streaming_kv_heads, self.kv_heads, self.w_sink, w_recent)
        return replace(spec, learned_sinks=self.learned_sinks, sliding_layers=sliding, sliding_window=sliding_window)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of each layer."""
        return self.num_key_value_heads or self.num_attention_heads


@strict
class HybridQwen2Config(HybridConfig, Qwen2Config):
    model_type = "lt_hybrid_qwen2"
    use_sliding_window: bool = True


@strict
class HybridQwen3Config(HybridConfig, Qwen3Config):
    model_type = "lt_hybrid_qwen3"
    use_sliding_window: bool = True


@strict
class HybridMinistralConfig(HybridConfig, MinistralConfig):
    """Llama and Mistral bases: Ministral has the same mathematics, and is their only stock class with layer types."""

    model_type = "lt_hybrid_ministral"


@strict
class HybridSmolLM3Config(HybridConfig, SmolLM3Config):
    model_type = "lt_hybrid_smollm3"
    use_sliding_window: bool = True


@strict
class HybridOlmo2Config(HybridConfig, Olmo2Config):
    model_type = "lt_hybrid_olmo2"


@strict
class HybridOlmo3Config(HybridConfig, Olmo3Config):
    model_type = "lt_hybrid_olmo3"


@strict
class HybridSeedOssConfig(HybridConfig, SeedOssConfig):
    model_type = "lt_hybrid_seed_oss"


@strict
class HybridGraniteConfig(HybridConfig, GraniteConfig):
    """Granite divides its logits by a constant. Here the hidden states before the head are divided by it, so that any code that
    computes logits from them and the head's weights gets the model's. With a power of two, as in the published models, both are
    equal to the last bit.
    """

    model_type = "lt_hybrid_granite"
    logits_scaling: float | int = 1.0
    hidden_scaling: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.hidden_scaling, self.logits_scaling = self.hidden_scaling * self.logits_scaling, 1.0


@strict
class HybridGlm4Config(HybridConfig, Glm4Config):
    model_type = "lt_hybrid_glm4"


@strict
class HybridPhi3Config(HybridConfig, Phi3Config):
    model_type = "lt_hybrid_phi3"


@strict
class HybridQwen3MoeConfig(HybridConfig, Qwen3MoeConfig):
    model_type = "lt_hybrid_qwen3_moe"
    use_sliding_window: bool = True


@strict
class HybridGptOssConfig(HybridConfig, GptOssConfig):
    model_type = "lt_hybrid_gpt_oss"
    base_has_sinks = True


def is_hybrid(config: PreTrainedConfig) -> bool:
    return isinstance(config, HybridConfig)
