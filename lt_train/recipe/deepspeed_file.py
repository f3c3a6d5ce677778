"""A DeepSpeed configuration against the recipe that names it: what both would say must be said by the recipe alone.

transformers fills in what is "auto" from the recipe. DeepSpeed itself passes over names that it does not know, finds contradictions
only once the model is loaded, and some not at all. So they are looked for here, before anything is loaded and without importing it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.messages import did_you_mean
from lt_train.recipe.schema import Recipe, Train
from lt_train.recipe.upstream_names import DEEPSPEED_ZERO_NAMES
from lt_train.runtime.errors import UserError

REFUSED = {
    "optimizer": "the optimizer follows from train.learning_rate, train.weight_decay and train.trl.optim",
    "scheduler": "the schedule follows from train.lr_scheduler and train.warmup_ratio",
    "amp": "the precision follows from model.dtype",
    "torch_autocast": "the precision follows from model.dtype",
    "elasticity": "it would change the batch with the number of processes; the batch follows from the recipe",
    "curriculum_learning": "it would cut samples short; their length follows from data.max_length",
    "data_efficiency": "it would drop tokens or change the order of data",
    "progressive_layer_drop": "it would train another model than the hybrid",
    "compression_training": "it would train another model than the hybrid",
    "quantize_training": "it would train another model than the hybrid",
    "sparse_attention": "what a layer sees follows from `hybrid`",
    "tensor_parallel": "hybrid classes are not split inside their layers; ZeRO-3 shards them",
    "sequence_parallel_size": "sequences are shared as train.sequence_parallel says",
    "pipeline": "hybrid classes are not split into stages; ZeRO-3 shards them",
    "wandb": "curves are logged as `track` says",
}
"""Blocks that would do beside the recipe what the recipe says, or what it cannot say: name -> why not."""


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is no such file, or it holds no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} (looked at {path.absolute()})") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object")
    return settings


def deepspeed_settings(path: Path, *, accumulates: bool) -> dict[str, Any]:
    """What DeepSpeed is told: the file, and where it does not say so that gradients of several micro-batches are summed up in fp32.

    DeepSpeed itself would sum them up in the dtype of the model (`get_data_types` in deepspeed/runtime/engine.py, 0.19). In bf16,
    which has 8 bits, a sum takes in nothing below 1/512 of it, and rounds whatever else is added.
    """
    settings = read_deepspeed_file(path)
    if not accumulates:  # a gradient that nothing is added to is the same in both, and twice as large in fp32
        return settings
    return settings | {"data_types": {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})}


def contradictions(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """Every way in which `settings`, a DeepSpeed configuration, does not go with the recipe, with the way out."""
    assert recipe.train is not None
    for name in settings.keys() & REFUSED.keys():
        yield f"{name}: {REFUSED[name]}. Take the block out"
    yield from _values(settings, recipe, recipe.train)
    yield from _precision(settings, recipe)
    yield from _sums(settings, recipe)
    zero = settings.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _zero(zero)
    else:
        yield 'zero_optimization: missing. Say what is sharded, such as {"stage": 3}; without DeepSpeed set train.deepspeed to null'


def _values(settings: dict[str, Any], recipe: Recipe, train: Train) -> Iterator[str]:
    """Numbers that the recipe says. Where one is missing DeepSpeed takes a default of its own, such as no clipping."""
    if train.batch_size is None and train.batch_tokens is None:
        return  # told of the recipe itself
    said = {
        "train_batch_size": ("train.batch_size", batch_samples(train, recipe.data)),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    for name, (setting, value) in said.items():
        given = settings.get(name)
        if given is None:
            yield f'{name}: missing, so {setting} would not reach DeepSpeed. Set it to "auto"'
        elif name == "train_batch_size" and train.sequence_parallel > 1 and given != "auto":
            yield f'{name}: {given!r}. DeepSpeed takes each slice of a shared sequence for a row. Set it to "auto"'
        elif given not in ("auto", value):
            yield f'{name}: {given!r}, but the recipe says {setting}: {value}. Set it to "auto"'
    steps = settings.get("gradient_accumulation_steps")
    if steps != "auto":
        given = "missing" if steps is None else f"{steps!r}"
        yield f'gradient_accumulation_steps: {given}. It follows from the batch and the number of processes. Set it to "auto"'


def _precision(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    dtype = recipe.model.dtype
    bf16, fp16 = (_enabled(settings, name) for name in ("bf16", "fp16"))
    if fp16 not in (None, False, "auto"):
        yield "fp16.enabled: models are trained in bf16 or fp32, as model.dtype says. Take the block out"
    if bf16 is None and dtype != "fp32":
        yield f'bf16.enabled: missing, so model.dtype: {dtype} would not reach DeepSpeed. Set it to "auto"'
    elif bf16 not in (None, "auto", {"bf16": True, "fp32": False}.get(dtype, "auto")):
        yield f'bf16.enabled: {bf16!r}, but the recipe says model.dtype: {dtype}. Set it to "auto"'


def _sums(settings: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """In what the gradients of several micro-batches are summed up, see `deepspeed_settings`."""
    types = settings.get("data_types", {})
    if not isinstance(types, dict):
        yield f'data_types: {types!r}. It is a block such as {{"grad_accum_dtype": "fp32"}}, which is what holds without it'
        return
    dtype = types.get("grad_accum_dtype", "fp32")
    if dtype not in ("fp32", "bf16"):
        yield f'data_types.grad_accum_dtype: {dtype!r}. Set it to "fp32", which is what holds without it, or to "bf16"'
    elif dtype == "bf16" and recipe.model.dtype == "fp32":
        yield 'data_types.grad_accum_dtype: "bf16", but the recipe says model.dtype: fp32. Take it out'


def _enabled(settings: dict[str, Any], name: str) -> Any:
    block = settings.get(name)
    return block.get("enabled", False) if isinstance(block, dict) else block


def _zero(zero: dict[str, Any]) -> Iterator[str]:
    for name in sorted(zero.keys() - DEEPSPEED_ZERO_NAMES):
        yield f"zero_optimization.{name}: no setting of DeepSpeed{did_you_mean(name, DEEPSPEED_ZERO_NAMES)}"
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        given = "missing" if stage is None else f"{stage!r}"
        yield f"zero_optimization.stage: {given}; it is 1, 2 or 3. To shard nothing set train.deepspeed to null"
    gather = "stage3_gather_16bit_weights_on_model_save"
    if stage == 3 and zero.get(gather) is not True:
        yield f"zero_optimization.{gather}: not true, so checkpoints would hold no weights. Set it to true"
    if stage in (1, 2) and _device(zero, "offload_param"):
        yield f"zero_optimization.offload_param: stage {stage} offloads no weights. Take it out, or set stage to 3"


def _device(zero: dict[str, Any], block: str) -> str | None:
    """Where to something is offloaded; None: it is not."""
    offload = zero.get(block)
    device = offload.get("device", "none") if isinstance(offload, dict) else "none"
    return None if device in (None, "none") else device
