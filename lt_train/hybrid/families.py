"""The families of base models: for each, transformers' classes with the hybrid's mixed in, and the bases that become it."""

from dataclasses import dataclass

from transformers.models.ministral.modeling_ministral import MinistralForCausalLM, MinistralModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model
from transformers.models.seed_oss.modeling_seed_oss import SeedOssForCausalLM, SeedOssModel
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3Model

from .configuration import (
    HybridConfig,
    HybridMinistralConfig,
    HybridOlmo2Config,
    HybridQwen2Config,
    HybridQwen3Config,
    HybridSeedOssConfig,
    HybridSmolLM3Config,
)
from .modeling import HybridBody, HybridForCausalLM


@dataclass(frozen=True)
class Family:
    """The classes that a base architecture becomes."""

    config_class: type[HybridConfig]
    model_class: type[HybridForCausalLM]


class HybridQwen2Model(HybridBody, Qwen2Model):
    config: HybridQwen2Config


class HybridQwen2ForCausalLM(HybridForCausalLM, Qwen2ForCausalLM):
    config: HybridQwen2Config
    body_class = HybridQwen2Model


class HybridQwen3Model(HybridBody, Qwen3Model):
    config: HybridQwen3Config


class HybridQwen3ForCausalLM(HybridForCausalLM, Qwen3ForCausalLM):
    config: HybridQwen3Config
    body_class = HybridQwen3Model


class HybridMinistralModel(HybridBody, MinistralModel):
    config: HybridMinistralConfig


class HybridMinistralForCausalLM(HybridForCausalLM, MinistralForCausalLM):
    config: HybridMinistralConfig
    body_class = HybridMinistralModel


class HybridSmolLM3Model(HybridBody, SmolLM3Model):
    config: HybridSmolLM3Config


class HybridSmolLM3ForCausalLM(HybridForCausalLM, SmolLM3ForCausalLM):
    config: HybridSmolLM3Config
    body_class = HybridSmolLM3Model


class HybridOlmo2Model(HybridBody, Olmo2Model):
    config: HybridOlmo2Config


class HybridOlmo2ForCausalLM(HybridForCausalLM, Olmo2ForCausalLM):
    config: HybridOlmo2Config
    body_class = HybridOlmo2Model


class HybridSeedOssModel(HybridBody, SeedOssModel):
    config: HybridSeedOssConfig


class HybridSeedOssForCausalLM(HybridForCausalLM, SeedOssForCausalLM):
    config: HybridSeedOssConfig
    body_class = HybridSeedOssModel


QWEN2 = Family(HybridQwen2Config, HybridQwen2ForCausalLM)
QWEN3 = Family(HybridQwen3Config, HybridQwen3ForCausalLM)
MINISTRAL = Family(HybridMinistralConfig, HybridMinistralForCausalLM)
SMOLLM3 = Family(HybridSmolLM3Config, HybridSmolLM3ForCausalLM)
OLMO2 = Family(HybridOlmo2Config, HybridOlmo2ForCausalLM)
SEED_OSS = Family(HybridSeedOssConfig, HybridSeedOssForCausalLM)

BASES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": MINISTRAL,
    "mistral": MINISTRAL,
    "ministral": MINISTRAL,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "seed_oss": SEED_OSS,
}
"""By the `model_type` of a base."""

FAMILIES: dict[str, Family] = {**BASES, **{family.config_class.model_type: family for family in BASES.values()}}
"""By the `model_type` of a base or of a hybrid."""
