"""Trained weights as a model for inference: adapters merged, queries and keys of the base restored where the recipe sets it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lt_train.hybrid.loading import load_hybrid_checkpoint
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import device_map
from lt_train.recipe.schema import Recipe
from lt_train.runtime.errors import UserError

QUERY_KEY = ("q_proj", "k_proj", "q_norm", "k_norm")
"""The modules that make queries and keys; the norms are Qwen3's."""

PROBE_TOKENS = 64
MERGE_TOLERANCE = 1e-3  # of the largest logit; merging in fp32 is off by some 1e-6

LoadModel = Callable[[torch.dtype], HybridForCausalLM]
"""Loads the hybrid before training in a dtype."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode.

    Attributes:
        merge_difference: largest |logit| difference of the merged model to base + adapter, in fp32; None without LoRA.
    """

    model: HybridForCausalLM
    merge_difference: float | None


def load_trained(recipe: Recipe, folder: Path, load_base: LoadModel, dtype: torch.dtype) -> TrainedModel:
    """The model that training left in `folder` (TrainResult.folder), ready for evaluation and export, in `dtype`.

    An adapter is merged in fp32 and only the sum is cast: merging in bf16 loses small updates (peft#1836, #2368). With
    train.restore_query_key the full-attention layers make their queries and keys as the base does.

    Raises:
        UserError: the merged model does not compute what base + adapter computed.
    """
    restores = recipe.train is not None and recipe.train.restore_query_key
    if recipe.lora is None:
        if restores:
            return TrainedModel(load_with_query_key_of_base(folder, load_base, dtype), None)
        return TrainedModel(load_hybrid_checkpoint(folder, dtype=dtype, device_map=device_map()).eval(), None)
    return merge_adapter(folder, load_base(torch.float32), dtype, restores_query_key=restores)


def merge_adapter(folder: Path, base: HybridForCausalLM, dtype: torch.dtype, *, restores_query_key: bool) -> TrainedModel:
    """The adapter in `folder`, merged into `base` (fp32) and cast to `dtype`.

    Raises:
        UserError: the merged model does not compute what base + adapter computed.
    """
    config = adapter_without_query_key(folder, base.spec) if restores_query_key else None
    adapted = PeftModel.from_pretrained(base, folder, config=config).eval()
    before = _probe_logits(adapted)
    merged = adapted.merge_and_unload()
    after = _probe_logits(merged)
    difference = check_merged(before, after, folder)
    return TrainedModel(merged.to(dtype), difference)


def check_merged(before: Tensor, after: Tensor, folder: Path) -> float:
    """The largest difference of what merged weights compute (`after`) to what base + adapter computed.

    Raises:
        UserError: it is more than rounding.
    """
    difference = (after - before).abs().max().item()
    if not difference <= MERGE_TOLERANCE * before.abs().max().item():  # a NaN fails as well
        raise UserError(
            f"{folder}: the outputs of the merged model differ by {difference:.2e} from those of base + adapter, so the model to "
            "evaluate is not the trained one. Fix: find the setting in lora.peft that cannot be merged, and train without it"
        )
    return difference


def load_with_query_key_of_base(folder: Path, load_base: LoadModel, dtype: torch.dtype) -> HybridForCausalLM:
    """The fully fine-tuned weights in `folder`, with queries and keys of the full-attention layers made as the base makes them
    (QK-Restore, arXiv 2606.11052).

    The base is loaded and all other weights are laid over it, a tensor at a time, so there is never a second model in memory.

    Raises:
        UserError: `folder` lacks weights or holds others.
    """
    model = load_base(dtype)
    parameters = dict(model.named_parameters())  # tied weights once
    restored = restored_weights(model.spec)
    missing = {name for name in parameters if not restored.search(name)}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            for name in opened.keys():  # noqa: SIM118  a file, no dict
                if name not in parameters:
                    raise UserError(f"{file}: {name}: this model has no such weight. Fix: train again into another run folder")
                if name in missing:
                    parameters[name].copy_(opened.get_tensor(name))
                    missing.remove(name)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing, such as {min(missing)}. Fix: delete this folder, and run the same "
            "command again: it publishes the weights again"
        )
    return model.eval()


def restored_weights(spec: HybridSpec) -> re.Pattern[str]:
    """Finds the names of the weights that make queries and keys in full-attention layers."""
    return re.compile(attention_modules(_full_layers(spec), QUERY_KEY))


def check_restorable(model: HybridForCausalLM) -> None:
    """
    Raises:
        UserError: a family that makes queries, keys and values by one projection.
    """
    if not hasattr(model.model.layers[0].self_attn, "q_proj"):
        raise UserError(
            f"train.restore_query_key: {model.config.model_type}: its layers make queries, keys and values by one projection, so "
            "queries and keys cannot be restored alone. Fix: set restore_query_key to false"
        )


def adapter_without_query_key(folder: Path, spec: HybridSpec) -> PeftConfig:
    """The configuration of the adapter in `folder`, less the adapters of queries and keys in full-attention layers."""
    config = PeftConfig.from_pretrained(str(folder))
    config.exclude_modules = rf".*{query_key_of_full_layers(spec)}"
    config.inference_mode = True
    return config


def query_key_of_full_layers(spec: HybridSpec) -> str:
    """A regular expression that finds the names of the modules with adapters that make queries and keys there."""
    return attention_modules(_full_layers(spec), ("q_proj", "k_proj"))


def attention_modules(layers: Iterable[int], modules: Iterable[str]) -> str:
    """A regular expression that finds the names of these attention modules in these decoder layers."""
    return rf"\blayers\.({'|'.join(map(str, layers))})\.self_attn\.({'|'.join(modules)})\b"


def _full_layers(spec: HybridSpec) -> list[int]:
    """The layers with full attention, in the base and in the hybrid."""
    return sorted(set(spec.full_in_base) - set(spec.streaming_layers))


@torch.no_grad()
def _probe_logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """Logits on the same seeded token ids each time. Returns fp32 (1, PROBE_TOKENS, vocab_size)."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float()
