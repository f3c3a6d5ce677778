"""The sizes of a recipe's model and its trained parameters, counted on torch's meta device, where weights take no memory."""

from dataclasses import dataclass, replace

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.kv_size import head_size, kv_heads
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Hybrid, Recipe
from lt_train.runtime.errors import UserError
from lt_train.selection.choose import choose_spec
from lt_train.training.trainable import freeze_all_but_lazy_projections, lora_config


@dataclass(frozen=True)
class Linear:
    """A linear module of a decoder layer.

    Attributes:
        name: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj; qkv_proj and gate_up_proj where a family fuses them.
        weights: parameters of the module itself, without an adapter's.
        trained: whether the weights are trained.
        used: the fraction of the weights that a token uses: those of its experts, where the module represents all experts.
        rank: of its LoRA adapter; 0 without one.
        adapter: parameters of the adapter.
    """

    name: str
    weights: int
    trained: bool
    rank: int = 0
    adapter: int = 0
    used: float = 1.0

    @property
    def keeps_input(self) -> bool:
        """Whether the gradient of a weight needs the module's input."""
        return self.trained or self.rank > 0


@dataclass(frozen=True)
class Layer:
    streaming: float
    """Fraction of its KV heads that stream."""
    linears: dict[str, Linear]
    parameters: int
    norms_trained: bool
    """Whether the weights of its RMSNorms are trained."""
    slides: bool = False
    """Whether it has a window in the base."""

    @property
    def is_split(self) -> bool:
        """Whether some of its KV heads stream, and the others keep full attention."""
        return 0 < self.streaming < 1

    @property
    def trains(self) -> bool:
        return self.norms_trained or any(linear.keeps_input for linear in self.linears.values())


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. `parameters` and `trainable` include adapters, and count an embedding that is also the head once."""

    parameters: int
    trainable: int
    spec: HybridSpec
    layers: tuple[Layer, ...]
    hidden: int
    queries: int
    """Width of all query heads: heads x head size."""
    keys: int
    """Width of all key heads; the values have the same."""
    heads: int
    key_heads: int
    mlp: int
    """Width of a token's MLP: that of all its experts together, where the family has experts."""
    experts: int
    """Of a layer; 0 where the family has none."""
    experts_of_token: int
    vocab_size: int
    tied: bool
    """The head shares the embedding's weights."""
    query_key_norms: int
    """Vectors of a token's queries and keys that are normalised: one for each head (Qwen3), 2 (OLMo: all heads as one), or 0."""
    norms_of_outputs: bool
    """What attention and MLP return is normalised as well as what they take (glm4)."""
    norms_in_fp32: bool
    """RMSNorms multiply by their weight before they cast back (OLMo 2), and keep what they multiply in fp32."""
    fused_qkv: bool
    """One projection makes queries, keys and values (phi3), and values keep all of its output."""
    copies_output: bool
    """o_proj needs a copy of attention's output: queries are joined of parts with and without rotary embedding (phi3, glm4), or
    the base has learned sinks, whose kernel keeps its output (gpt-oss)."""
    clamps_gates: bool
    """Experts clamp gate and up, and keep both before and after (gpt-oss)."""
    head_trained: bool
    embedding_trained: bool
    context: int

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden

    @property
    def base_parameters(self) -> int:
        """Parameters without adapters."""
        return self.parameters - self.adapters

    @property
    def layer_linears(self) -> int:
        return sum(linear.weights for layer in self.layers for linear in layer.linears.values())

    @property
    def used_linears(self) -> int:
        """Weights of `layer_linears` that one token uses."""
        return sum(int(linear.weights * linear.used) for layer in self.layers for linear in layer.linears.values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, without adapters."""
        return self.base_parameters - self.layer_linears + self.used_linears

    @property
    def adapters(self) -> int:
        return sum(linear.adapter for layer in self.layers for linear in layer.linears.values())


def model_shape(recipe: Recipe, base_config: PreTrainedConfig) -> ModelShape:
    """
    Raises:
        UserError: the recipe's layers, ratio or LoRA targets do not fit this model.
        HybridError: a base that cannot become a hybrid.
    """
    hybrid = recipe.hybrid
    spec = _spec(hybrid, base_spec(base_config.to_dict()), kv_heads(base_config.to_dict()))
    with torch.device("meta"):
        model = build_hybrid(base_config, spec)
        _freeze_what_is_not_trained(recipe, spec, model)
    return _shape_of(model, spec)


def _spec(hybrid: Hybrid, base: HybridSpec, heads: int) -> HybridSpec:
    """As many layers as will stream. Which ones is unknown before profiling, and of no effect: all have the same size.

    As many KV heads, spread evenly: then the most layers have some that stream, and so the most adapters of lora.layers: lazy, and
    the most are split, and so have the most activations. KV cache and operations do not depend on where the heads are.
    """
    return choose_spec(hybrid.model_copy(update={"strategy": "periodic"}), base, heads, seed=0)


def _freeze_what_is_not_trained(recipe: Recipe, spec: HybridSpec, model: HybridForCausalLM) -> None:
    if recipe.train is None:
        model.requires_grad_(False)
    elif recipe.train.parameters == "lazy_projections":
        freeze_all_but_lazy_projections(model, spec)
    elif recipe.lora is not None:
        get_peft_model(model, lora_config(recipe.lora, spec, model))  # adds the adapters to `model` itself


def _shape_of(model: HybridForCausalLM, spec: HybridSpec) -> ModelShape:
    config = model.config
    attention = model.model.layers[0].self_attn
    olmo2 = config.model_type in ("lt_hybrid_olmo2", "lt_hybrid_olmo3")
    experts = next((module for name, module in model.named_modules() if name.endswith(".experts")), None)
    of_token = 0 if experts is None else config.num_experts_per_tok
    heads = 2 if olmo2 else config.num_attention_heads + config.num_key_value_heads
    parameters = list(model.parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return ModelShape(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        spec=spec,
        layers=tuple(
            replace(_layer(layer, len(streaming) / config.num_key_value_heads, of_token), slides=index in spec.sliding_layers)
            for index, (layer, streaming) in enumerate(
                zip(model.model.layers, spec.streaming_heads(config.num_key_value_heads), strict=True)
            )
        ),
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head_size(config.to_dict()),
        keys=config.num_key_value_heads * head_size(config.to_dict()),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        mlp=config.intermediate_size if experts is None else of_token * experts.down_proj[0].numel() // config.hidden_size,
        experts=0 if experts is None else experts.num_experts,
        experts_of_token=of_token,
        vocab_size=config.vocab_size,
        tied=head.weight is embedding.weight,
        query_key_norms=heads if hasattr(attention, "q_norm") else 0,
        norms_of_outputs=config.model_type == "lt_hybrid_glm4",
        norms_in_fp32=olmo2,
        fused_qkv=hasattr(attention, "qkv_proj"),
        copies_output=config.model_type in ("lt_hybrid_phi3", "lt_hybrid_glm4") or config.base_has_sinks,
        clamps_gates=hasattr(config, "swiglu_limit"),
        head_trained=_trains(head),
        embedding_trained=_trains(embedding),
        context=context_length(config.to_dict()),
    )


OTHER_NAMES = {"dense": "o_proj", "c_fc": "up_proj", "fc1": "up_proj", "c_proj": "down_proj", "fc2": "down_proj"}
"""Names of linear modules in families that are not declared, and what Llama calls them."""


def _layer(layer: nn.Module, streaming: float, experts_per_token: int) -> Layer:
    linears: dict[str, Linear] = {}
    inside = tuple(name for name, module in layer.named_modules() if isinstance(module, LoraLayer))
    for path, module in layer.named_modules():
        name = path.rsplit(".", 1)[-1]
        name = OTHER_NAMES.get(name, name)
        name = path if name in linears else name  # of a shared expert beside the others
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            weights = sum(p.numel() for p in base.parameters())
            adapter = sum(p.numel() for p in module.parameters()) - weights
            linears[name] = Linear(name, weights, _trains(base), module.r["default"], adapter)
        elif isinstance(module, nn.Linear) and not path.startswith(inside):
            linears[name] = Linear(name, sum(p.numel() for p in module.parameters()), _trains(module))
        elif name == "experts":
            used = experts_per_token / module.num_experts
            for projection, weight in module.named_parameters():
                linears[projection] = Linear(projection, weight.numel(), weight.requires_grad, used=used)
    lacking = {"o_proj", "down_proj"} - linears.keys()
    if lacking:
        problem = f"no module of a layer has this name ({', '.join(sorted(linears))}), so its memory cannot be planned"
        raise UserError(f"model.family: auto: {' and '.join(sorted(lacking))}: {problem}. Fix: run the recipe without a plan")
    norms = [p for name, p in layer.named_parameters() if "norm" in name]
    return Layer(streaming, linears, sum(p.numel() for p in layer.parameters()), any(p.requires_grad for p in norms))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
