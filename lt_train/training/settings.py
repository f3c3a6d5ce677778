"""A recipe's training settings: as TRL's SFTConfig, as the dtype of the weights, and as what a checkpoint must agree with."""

import json
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.batch_size import accumulation_steps
from lt_train.recipe.deepspeed_file import deepspeed_settings, read_deepspeed_file
from lt_train.recipe.schema import Recipe, Train, identity_of, settings_that_may_change
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import this_process
from lt_train.training.checkpoints import Settings
from lt_train.training.launch import check_launch


def sft_config(recipe: Recipe, train: Train, out: Path) -> SFTConfig:
    """Everything TRL is told. Our rows are tokenized already, so its own preparation of data is off."""
    bf16, process = trains_in_bf16(recipe), this_process()
    check_launch(recipe, train, process)
    accumulation = accumulation_steps(train, recipe.data, process.count)
    ours = {
        "output_dir": str(out),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": bf16,
        # unless the CPU is asked for, transformers refuses bf16 on it, and accelerate takes each process for the only one
        "use_cpu": not torch.accelerator.is_available(),
        "deepspeed": deepspeed_settings(Path(train.deepspeed), accumulates=accumulation > 1) if train.deepspeed else None,
        "ddp_find_unused_parameters": False,
        # data
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing,
        "eval_packing": False,
        # optimization
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_ratio,  # below 1 it is a share of all steps
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "num_train_epochs": train.epochs or 1,
        "max_steps": train.max_steps or -1,  # -1: as the epochs say
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "use_cache": False,
        # evaluation: a row of a padding-free batch is a whole batch, so packed runs evaluate one sample at a time
        "per_device_eval_batch_size": 1 if recipe.data.packing else train.micro_batch_size,
        "eval_strategy": "steps" if recipe.data.heldout else "no",
        "eval_steps": train.eval_steps or 10**9,  # Trainer evaluates after the last step as well
        # checkpoints and logs; old checkpoints are deleted by WriteManifest
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN must show
        # slices of a sequence have no mask, and count up to sequence_parallel - 1 tokens of padding
        "include_num_input_tokens_seen": "all" if recipe.data.packing or train.sequence_parallel > 1 else "non_padding",
        "disable_tqdm": True,
        "report_to": "none",
    }
    if train.sequence_parallel > 1:
        ours["pad_to_multiple_of"] = train.sequence_parallel  # slices are of equal length
    taken = sorted(ours.keys() & train.trl.keys())
    if taken:
        raise UserError(f"train.trl: {', '.join(taken)}: set by lt_train itself from the rest of the recipe. Remove it")
    try:
        config = SFTConfig(**ours, **train.trl)
    except (ValueError, TypeError, ImportError) as error:  # transformers checks values and combinations here
        raise UserError(f"train: TRL does not take these settings: {error}") from error
    if config.deepspeed is not None:
        _start_deepspeed()
    return config


def _start_deepspeed() -> None:
    """Start DeepSpeed's own communication, beside that of accelerate.

    Where there is no GPU accelerate starts torch.distributed alone, and DeepSpeed would shard a model as it is loaded (zero.Init)
    for a world of one process.
    """
    import deepspeed

    if not torch.accelerator.is_available():
        # Collectives of its own, which it would compile at the first start (a minute or two, and a compiler must be there) and
        # which wait for ever for a process that died; gloo does without. deepspeed/ops/__init__.py keeps this table open to edits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def trains_in_bf16(recipe: Recipe) -> bool:
    """Whether matrix products of the training run in bf16: as model.dtype says; auto: where the device computes in bf16."""
    return compute_dtype(recipe.model.dtype) == torch.bfloat16


def weights_dtype(recipe: Recipe, train: Train) -> torch.dtype:
    """The dtype in which to load the weights.

    A step of AdamW at a fine-tuning learning rate is smaller than bf16 can add to a weight (8 bits of mantissa), so weights
    that are trained are kept in fp32 and cast to bf16 for the products (autocast). Two cases need no such copy of their own:
    LoRA, whose base is frozen and whose adapter PEFT keeps in fp32, and DeepSpeed, whose optimizer keeps fp32 weights beside
    the bf16 ones.
    """
    if not trains_in_bf16(recipe):
        return torch.float32
    return torch.bfloat16 if train.method == "lora" or train.deepspeed else torch.float32


def settings_of_training(recipe: Recipe, train: Train, spec: HybridSpec, data_sha256: str, num_processes: int) -> Settings:
    """All that shapes the course of a training, flat and by the recipe's names: a checkpoint goes on only where all of it is equal.

    The settings that may change in a begun run may change between a kill and the resume.
    """
    may_change = settings_that_may_change(Train)
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "model.base": recipe.model.base,
        "model.revision": recipe.model.revision,
        "bf16": trains_in_bf16(recipe),
        "lazy layers": list(spec.lazy_layers),
        "hybrid.w_sink": spec.w_sink,
        "hybrid.w_recent": spec.w_recent,
        "data.max_length": recipe.data.max_length,
        "data.packing": recipe.data.packing,
        "SHA-256 of the training data": data_sha256,
        "train.deepspeed (content)": read_deepspeed_file(Path(train.deepspeed)) if train.deepspeed else None,
    }
    settings |= _processes_that_matter(recipe, train, num_processes)
    settings |= {f"train.{k}": v for k, v in identity_of(train, without=may_change).items()}
    settings |= {f"lora.{k}": v for k, v in (identity_of(recipe.lora) if recipe.lora else {}).items()}
    return json.loads(json.dumps(settings))  # as a manifest gives it back: tuples are lists there


def teacher_fingerprint(recipe: Recipe, data_sha256: str) -> dict[str, str | int | float]:
    """What decides what a teacher says on the training data."""
    return {
        "model.base": recipe.model.base,
        "model.revision": str(recipe.model.revision),
        "bf16": str(trains_in_bf16(recipe)),
        "SHA-256 of the training data": data_sha256,
    }


def _processes_that_matter(recipe: Recipe, train: Train, count: int) -> Settings:
    """The number of processes where another number would go on differently: the batch itself is the same with any."""
    if train.deepspeed is not None:
        return {"number of processes, among which DeepSpeed splits the optimizer's states": count}
    if recipe.lora is not None and recipe.lora.dropout > 0:
        return {"number of processes, each of which draws its own dropout": count}
    if train.trl.get("neftune_noise_alpha"):
        return {"number of processes, each of which draws its own noise for train.trl.neftune_noise_alpha": count}
    return {}
