"""LoRA on the converted layers: which modules get an adapter, and how a trained model comes back, adapter merged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from lt_train.hybrid.loading import load_hybrid_checkpoint
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import device_map
from lt_train.recipe.schema import Lora, Recipe
from lt_train.runtime.errors import UserError
from lt_train.training.projections import adapter_without_query_key, load_with_query_key_of_base

LAYERS = "layers"  # the decoder layers of every hybrid class: model.layers.<i>
PROBE_TOKENS = 64
MERGE_TOLERANCE = 1e-3  # of the largest logit; merging in fp32 is off by some 1e-6


@dataclass(frozen=True)
class TrainedModel:
    model: PreTrainedModel
    merge_difference: float | None  # largest |logit| difference of the merged model to base + adapter, in fp32; None without LoRA


def lora_config(lora: Lora, spec: HybridSpec, model: nn.Module) -> LoraConfig:
    """PEFT's configuration: adapters on `lora.targets` of the lazy layers, or of all.

    Raises:
        UserError: a target that no such layer has, or no lazy layer to train.
    """
    layers = list(range(spec.num_layers)) if lora.layers == "all" else list(spec.lazy_layers)
    if not layers:
        raise UserError("lora.layers: lazy: no layer of this model streams, so nothing would be trained. Set lora.layers: all")
    _check_targets(lora.targets, model)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        layers_to_transform=layers,
        layers_pattern=LAYERS,
        task_type="CAUSAL_LM",
        **lora.peft,
    )


def load_trained(
    recipe: Recipe, folder: Path, load_base: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype
) -> TrainedModel:
    """The model that training left in `folder` (TrainResult.folder), ready for evaluation and export, in `dtype`.

    `load_base` gives the hybrid before training in the dtype asked for. An adapter is merged into it in fp32 and only the sum is
    cast; merging in bf16 loses small updates (peft#1836, #2368). With train.restore_query_key the full-attention layers make their
    queries and keys as the base does.

    Raises:
        UserError: the merged model does not compute what base + adapter computed.
    """
    restores = recipe.train is not None and recipe.train.restore_query_key
    if recipe.lora is None:
        if restores:
            return TrainedModel(load_with_query_key_of_base(folder, load_base, dtype), None)
        return TrainedModel(load_hybrid_checkpoint(folder, dtype=dtype, device_map=device_map()).eval(), None)
    base = load_base(torch.float32)
    config = adapter_without_query_key(folder, base.config.spec) if restores else None
    adapted = PeftModel.from_pretrained(base, folder, config=config).eval()
    before = _probe_logits(adapted)
    merged = adapted.merge_and_unload()
    after = _probe_logits(merged)
    difference = (after - before).abs().max().item()
    if not difference <= MERGE_TOLERANCE * before.abs().max().item():  # a NaN fails as well
        raise UserError(
            f"{folder}: with the adapter merged the logits differ by {difference:.2e} from those with the adapter beside the "
            "base, so what would be evaluated is not what was trained. See which of lora.peft cannot be merged, and train "
            "without it"
        )
    return TrainedModel(merged.to(dtype), difference)


def _check_targets(targets: list[str], model: nn.Module) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{LAYERS}." in name]
    available = sorted({name.rsplit(".", 1)[-1] for name in linear})
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        raise UserError(
            f"lora.targets: {', '.join(unknown)}: no linear module of a layer has this name. This model has: {', '.join(available)}"
        )


@torch.no_grad()
def _probe_logits(model: nn.Module) -> torch.Tensor:
    """Logits on the same seeded token ids each time. Returns fp32 (1, PROBE_TOKENS, vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float()
