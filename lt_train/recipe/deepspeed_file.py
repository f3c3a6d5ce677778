"""A DeepSpeed configuration against the recipe that names it: what both could set is set by the recipe alone.

transformers fills in what is "auto" from the recipe. DeepSpeed itself ignores names that it does not know, and finds contradictions
late or not at all. So they are found here, before anything is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.schema import Recipe, Train
from lt_train.recipe.upstream import unknown_zero_setting
from lt_train.runtime.errors import UserError, shortened, shown

REFUSED = {
    "optimizer": "the optimizer follows from train.learning_rate, train.weight_decay and train.trl.optim",
    "scheduler": "the schedule follows from train.lr_scheduler and train.warmup_ratio",
    "amp": "the precision follows from model.dtype",
    "torch_autocast": "the precision follows from model.dtype",
    "elasticity": "it would change the batch with the number of processes; the batch follows from the recipe",
    "curriculum_learning": "it would truncate samples; their length follows from data.max_length",
    "data_efficiency": "it would drop tokens or change the order of data",
    "progressive_layer_drop": "it would train another model than the hybrid",
    "compression_training": "it would train another model than the hybrid",
    "quantize_training": "it would train another model than the hybrid",
    "sparse_attention": "what a layer sees follows from `hybrid`",
    "tensor_parallel": "hybrid classes are not split inside their layers; ZeRO-3 shards them",
    "sequence_parallel_size": "processes share sequences by train.sequence_parallel",
    "pipeline": "hybrid classes are not split into stages; ZeRO-3 shards them",
    "wandb": "metrics are logged as `track` sets",
}
"""Blocks that would set what the recipe sets, or what a recipe cannot set: name -> why not."""


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    name = shortened(str(path), 300)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file (looked at {shortened(str(path.absolute()), 300)})") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{name}: not a JSON object")
    return settings


def deepspeed_settings(path: Path, *, accumulates: bool) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: the file, with sums of the gradients of several micro-batches in fp32 by default.

    DeepSpeed itself would sum them up in the dtype of the model (`get_data_types` in deepspeed/runtime/engine.py, 0.19). In bf16,
    which has 8 bits, a sum takes in nothing below 1/512 of it, and rounds whatever else is added.
    """
    settings = read_deepspeed_file(path)
    if not accumulates:  # a gradient that nothing is added to is the same in both, and twice as large in fp32
        return settings
    return settings | {"data_types": {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})}


def contradictions(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """Every setting of a DeepSpeed configuration that contradicts the recipe, with the fix."""
    assert recipe.train is not None
    for name in settings.keys() & REFUSED.keys():
        yield f"{name}: {REFUSED[name]}. Fix: remove the block"
    yield from _values(settings, recipe, recipe.train)
    yield from _precision(settings, recipe)
    yield from _gradient_dtype(settings, recipe)
    zero = settings.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _zero(zero)
    else:
        yield 'zero_optimization: missing. Fix: set what is sharded, such as {"stage": 3}, or train.deepspeed to null'


def _values(settings: dict[str, Any], recipe: Recipe, train: Train) -> Iterator[str]:
    """Numbers that the recipe sets. Where one is missing DeepSpeed takes a default of its own, such as no clipping."""
    if train.batch_size is None and train.batch_tokens is None:
        return  # reported of the recipe itself
    auto = 'Fix: set it to "auto"'
    expected = {
        "train_batch_size": ("train.batch_size", batch_samples(train, recipe.data)),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    for name, (setting, value) in expected.items():
        given = settings.get(name)
        if given is None:
            yield f"{name}: missing, so {setting} would not reach DeepSpeed. {auto}"
        elif name == "train_batch_size" and train.sequence_parallel > 1 and given != "auto":
            yield f"{name}: {shown(given)}: DeepSpeed counts each slice of a shared sequence as a row. {auto}"
        elif given not in ("auto", value):
            yield f"{name}: {shown(given)}: contradicts {setting}: {value}. {auto}"
    steps = settings.get("gradient_accumulation_steps")
    if steps != "auto":
        given = "missing" if steps is None else shown(steps)
        yield f"gradient_accumulation_steps: {given}: it follows from the batch and the number of processes. {auto}"


def _precision(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    dtype = recipe.model.dtype
    bf16, fp16 = (_enabled(settings, name) for name in ("bf16", "fp16"))
    if fp16 not in (None, False, "auto"):
        yield "fp16.enabled: model.dtype allows bf16 and fp32 only. Fix: remove the block"
    if bf16 is None and dtype != "fp32":
        yield f'bf16.enabled: missing, so model.dtype: {dtype} would not reach DeepSpeed. Fix: set it to "auto"'
    elif bf16 not in (None, "auto", {"bf16": True, "fp32": False}.get(dtype, "auto")):
        yield f'bf16.enabled: {shown(bf16)}: contradicts model.dtype: {dtype}. Fix: set it to "auto"'


def _gradient_dtype(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """The dtype in which the gradients of several micro-batches are summed up, see `deepspeed_settings`."""
    types = settings.get("data_types", {})
    if not isinstance(types, dict):
        yield f'data_types: {shown(types)}: not a block. Fix: remove it, or write {{"grad_accum_dtype": "fp32"}}, the default'
        return
    dtype = types.get("grad_accum_dtype", "fp32")
    if dtype not in ("fp32", "bf16"):
        yield f'data_types.grad_accum_dtype: {shown(dtype)}: unknown. Fix: set it to "fp32", the default, or to "bf16"'
    elif dtype == "bf16" and recipe.model.dtype == "fp32":
        yield 'data_types.grad_accum_dtype: "bf16": contradicts model.dtype: fp32. Fix: remove it'


def _enabled(settings: dict[str, Any], name: str) -> Any:
    block = settings.get(name)
    return block.get("enabled", False) if isinstance(block, dict) else block


def _zero(zero: dict[str, Any]) -> Iterator[str]:
    for name in sorted(zero):
        if problem := unknown_zero_setting(name):
            yield f"zero_optimization.{shortened(name)}: {problem}"
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        given = "missing" if stage is None else f"{shown(stage)}: not a stage"
        yield f"zero_optimization.stage: {given}. Fix: set it to 1, 2 or 3, or train.deepspeed to null to shard nothing"
    gather = "stage3_gather_16bit_weights_on_model_save"
    if stage == 3 and zero.get(gather) is not True:
        yield f"zero_optimization.{gather}: not true, so checkpoints would hold no weights. Fix: set it to true"
    if stage in (1, 2) and _device(zero, "offload_param"):
        yield f"zero_optimization.offload_param: stage {stage} offloads no weights. Fix: remove it, or set stage to 3"


def _device(zero: dict[str, Any], block: str) -> str | None:
    """The device to which something is offloaded; None: it is not."""
    offload = zero.get(block)
    device = offload.get("device", "none") if isinstance(offload, dict) else "none"
    return None if device in (None, "none") else device
