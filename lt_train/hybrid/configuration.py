"""Configs of the hybrid classes: the base's own config with native `layer_types` and `sliding_window`, plus `w_sink`.

Each has a `model_type` of its own, so that software that does not know sinks stops instead of running without them.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .spec import FULL, HYBRID_VERSION, STREAMING, HybridError, HybridSpec


class HybridConfigMixin:
    """What the configs of all families add. Mixed in before the family's config."""

    def check_hybrid(self) -> None:
        """Raises HybridError unless the fields describe a hybrid that this code computes."""
        unknown = set(self.layer_types) - {FULL, STREAMING}
        if unknown:
            raise HybridError(f"layer_types: unknown {sorted(unknown)}; a hybrid has {FULL} and {STREAMING}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise HybridError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}")
        if self.sliding_window is None:
            raise HybridError("sliding_window: missing; it is w_recent, the window of the streaming layers in tokens")
        if self.hybrid_version != HYBRID_VERSION:
            raise HybridError(
                f"hybrid_version={self.hybrid_version!r}: this code computes version {HYBRID_VERSION!r}. "
                "Load the checkpoint with the code beside it (trust_remote_code=True), or with the lt_train that made it"
            )
        self.spec  # its sizes check themselves  # noqa: B018

    @property
    def spec(self) -> HybridSpec:
        return HybridSpec.from_layer_types(self.layer_types, self.w_sink, self.sliding_window)


@strict
class HybridQwen2Config(HybridConfigMixin, Qwen2Config):
    model_type = "lt_hybrid_qwen2"
    use_sliding_window: bool = True
    w_sink: int = 4
    hybrid_version: str = HYBRID_VERSION

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_hybrid()


@strict
class HybridQwen3Config(HybridConfigMixin, Qwen3Config):
    model_type = "lt_hybrid_qwen3"
    use_sliding_window: bool = True
    w_sink: int = 4
    hybrid_version: str = HYBRID_VERSION

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_hybrid()


@strict
class HybridMinistralConfig(HybridConfigMixin, MinistralConfig):
    """Llama and Mistral bases: the same mathematics, and the one stock class of theirs with layer types."""

    model_type = "lt_hybrid_ministral"
    w_sink: int = 4
    hybrid_version: str = HYBRID_VERSION

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_hybrid()


HybridConfig = HybridQwen2Config | HybridQwen3Config | HybridMinistralConfig


def is_hybrid(config: PreTrainedConfig) -> bool:
    return isinstance(config, HybridConfigMixin)
