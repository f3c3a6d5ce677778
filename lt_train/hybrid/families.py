"""The families of base models: for each, transformers' classes with the hybrid's mixed in, and the bases that become it."""

from functools import partial

from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.glm4.modeling_glm4 import Glm4ForCausalLM, Glm4Model
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM, GptOssModel
from transformers.models.granite.modeling_granite import GraniteForCausalLM, GraniteModel
from transformers.models.ministral.modeling_ministral import MinistralForCausalLM, MinistralModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3ForCausalLM, Olmo3Model
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.seed_oss.modeling_seed_oss import SeedOssForCausalLM, SeedOssModel
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3Model

from .configuration import (
    HybridGlm4Config,
    HybridGptOssConfig,
    HybridGraniteConfig,
    HybridMinistralConfig,
    HybridOlmo2Config,
    HybridOlmo3Config,
    HybridPhi3Config,
    HybridQwen2Config,
    HybridQwen3Config,
    HybridQwen3MoeConfig,
    HybridSeedOssConfig,
    HybridSmolLM3Config,
)
from .modeling import Family, HybridBody, HybridForCausalLM


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


class HybridOlmo3Model(HybridBody, Olmo3Model):
    config: HybridOlmo3Config


class HybridOlmo3ForCausalLM(HybridForCausalLM, Olmo3ForCausalLM):
    config: HybridOlmo3Config
    body_class = HybridOlmo3Model


class HybridSeedOssModel(HybridBody, SeedOssModel):
    config: HybridSeedOssConfig


class HybridSeedOssForCausalLM(HybridForCausalLM, SeedOssForCausalLM):
    config: HybridSeedOssConfig
    body_class = HybridSeedOssModel


class HybridGraniteModel(HybridBody, GraniteModel):
    """Embedding and final norm scale what they return, for code that runs the layers one by one as well."""

    config: HybridGraniteConfig
    embedding_multiplier: float

    def __init__(self, config: HybridGraniteConfig) -> None:
        super().__init__(config)
        self.embed_tokens.register_forward_hook(partial(_scaled, self.embedding_multiplier))
        self.embedding_multiplier = 1.0
        self.norm.register_forward_hook(partial(_scaled, 1 / config.hidden_scaling))


class HybridGraniteForCausalLM(HybridForCausalLM, GraniteForCausalLM):
    config: HybridGraniteConfig
    body_class = HybridGraniteModel


def _scaled(factor: float, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * factor


class HybridGlm4Model(HybridBody, Glm4Model):
    config: HybridGlm4Config


class HybridGlm4ForCausalLM(HybridForCausalLM, Glm4ForCausalLM):
    config: HybridGlm4Config
    body_class = HybridGlm4Model


class HybridPhi3Model(HybridBody, Phi3Model):
    config: HybridPhi3Config


class HybridPhi3ForCausalLM(HybridForCausalLM, Phi3ForCausalLM):
    config: HybridPhi3Config
    body_class = HybridPhi3Model


class HybridMoeForCausalLM(HybridForCausalLM):
    """A mixture of experts. Experts, their router and its loss stay what they are."""

    def __init__(self, config: HybridQwen3MoeConfig | HybridGptOssConfig) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok


class HybridQwen3MoeModel(HybridBody, Qwen3MoeModel):
    config: HybridQwen3MoeConfig


class HybridQwen3MoeForCausalLM(HybridMoeForCausalLM, Qwen3MoeForCausalLM):
    config: HybridQwen3MoeConfig
    body_class = HybridQwen3MoeModel


class HybridGptOssModel(HybridBody, GptOssModel):
    config: HybridGptOssConfig


class HybridGptOssForCausalLM(HybridMoeForCausalLM, GptOssForCausalLM):
    config: HybridGptOssConfig
    body_class = HybridGptOssModel


# Checkpoints hold each expert's weights, and the module those of all experts in one.
register_checkpoint_conversion_mapping(
    HybridQwen3MoeConfig.model_type, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)

QWEN2 = Family(HybridQwen2Config, HybridQwen2ForCausalLM)
QWEN3 = Family(HybridQwen3Config, HybridQwen3ForCausalLM)
MINISTRAL = Family(HybridMinistralConfig, HybridMinistralForCausalLM)
SMOLLM3 = Family(HybridSmolLM3Config, HybridSmolLM3ForCausalLM)
OLMO2 = Family(HybridOlmo2Config, HybridOlmo2ForCausalLM)
OLMO3 = Family(HybridOlmo3Config, HybridOlmo3ForCausalLM)
SEED_OSS = Family(HybridSeedOssConfig, HybridSeedOssForCausalLM)
GRANITE = Family(HybridGraniteConfig, HybridGraniteForCausalLM)
GLM4 = Family(HybridGlm4Config, HybridGlm4ForCausalLM)
PHI3 = Family(HybridPhi3Config, HybridPhi3ForCausalLM)
QWEN3_MOE = Family(HybridQwen3MoeConfig, HybridQwen3MoeForCausalLM)
GPT_OSS = Family(HybridGptOssConfig, HybridGptOssForCausalLM)

BASES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": MINISTRAL,
    "mistral": MINISTRAL,
    "ministral": MINISTRAL,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "seed_oss": SEED_OSS,
    "granite": GRANITE,
    "glm4": GLM4,
    "phi3": PHI3,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
}
"""By the `model_type` of a base."""

FAMILIES: dict[str, Family] = {**BASES, **{family.config_class.model_type: family for family in BASES.values()}}
"""By the `model_type` of a base or of a hybrid."""
