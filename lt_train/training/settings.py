"""A recipe's training settings: as TRL's SFTConfig, as the dtype of the weights, and as the settings of a checkpoint."""

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
from lt_train.training.launch import check_launch, start_deepspeed


def sft_config(recipe: Recipe, train: Train, out: Path) -> SFTConfig:
    """TRL's configuration. The rows are already tokenized, so TRL's preparation of data is off."""
    bf16, process = trains_in_bf16(recipe), this_process()
    check_launch(recipe, train, process)
    accumulation = accumulation_steps(train, recipe.data, process.count)
    ours = {
        "output_dir": str(out),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": bf16,
        # without use_cpu, transformers refuses bf16 on a CPU, and accelerate starts each process with a world size of 1
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
        "warmup_steps": train.warmup_ratio,  # below 1 it is a fraction of all steps
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "num_train_epochs": train.epochs or 1,
        "max_steps": train.max_steps or -1,  # -1: num_train_epochs decides
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "use_cache": False,
        # evaluation: a padding-free batch has one row, so packed runs evaluate one sample at a time
        "per_device_eval_batch_size": 1 if recipe.data.packing else train.micro_batch_size,
        "eval_strategy": "steps" if recipe.data.heldout else "no",
        "eval_steps": train.eval_steps or 10**9,  # Trainer also evaluates after the last step
        # checkpoints and logs; old checkpoints are deleted by WriteManifest
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # log a NaN as it is
        # shards of a sequence have no mask, so up to sequence_parallel - 1 tokens of padding are counted
        "include_num_input_tokens_seen": "all" if recipe.data.packing or train.sequence_parallel > 1 else "non_padding",
        "disable_tqdm": True,
        "report_to": "none",
    }
    if train.sequence_parallel > 1:
        ours["pad_to_multiple_of"] = train.sequence_parallel  # shards have equal lengths
    taken = sorted(ours.keys() & train.trl.keys())
    if taken:
        raise UserError(
            f"train.trl: {', '.join(taken)}: lt_train sets it from the rest of the recipe. Fix: remove it from train.trl"
        )
    try:
        config = SFTConfig(**ours, **train.trl)
    except (ValueError, TypeError, ImportError) as error:  # transformers checks values and combinations here
        raise UserError(f"train: TRL refuses these settings: {error}. Fix: change them in train or train.trl") from error
    if config.deepspeed is not None:
        start_deepspeed()
    return config


def trains_in_bf16(recipe: Recipe) -> bool:
    """Whether matrix products of the training run in bf16, by model.dtype; auto: if the device computes in bf16."""
    return compute_dtype(recipe.model.dtype) == torch.bfloat16


def weights_dtype(recipe: Recipe, train: Train) -> torch.dtype:
    """The dtype in which to load the weights.

    A step of AdamW at a fine-tuning learning rate is too small to change a bf16 weight (8 bits of mantissa), so trained weights are
    kept in fp32 and cast to bf16 for the products (autocast). Two cases need no fp32 weights here: LoRA, whose base is frozen and
    whose adapter PEFT keeps in fp32, and DeepSpeed, whose optimizer keeps an fp32 copy of bf16 weights.
    """
    if not trains_in_bf16(recipe):
        return torch.float32
    return torch.bfloat16 if train.method == "lora" or train.deepspeed else torch.float32


def settings_of_training(recipe: Recipe, train: Train, spec: HybridSpec, data_sha256: str, num_processes: int) -> Settings:
    """The settings that affect a training, flat, by their names in the recipe: a run resumes from a checkpoint with equal ones.

    Settings that may change in a begun run are left out.
    """
    may_change = settings_that_may_change(Train)
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "model.base": recipe.model.base,
        "model.revision": recipe.model.revision,
        "bf16": trains_in_bf16(recipe),
        "lazy layers": list(spec.lazy_layers),
        **({"KV heads that stream in split layers": list(spec.split_layers)} if spec.split_layers else {}),
        "hybrid.w_sink": spec.w_sink,
        "hybrid.w_recent": spec.w_recent,
        **({"hybrid.sink": "learned"} if spec.learned_sinks else {}),
        "data.max_length": recipe.data.max_length,
        "data.packing": recipe.data.packing,
        "SHA-256 of the training data": data_sha256,
        "train.deepspeed (content)": read_deepspeed_file(Path(train.deepspeed)) if train.deepspeed else None,
    }
    settings |= _division_that_matters(recipe, train, num_processes)
    settings |= {f"train.{k}": v for k, v in identity_of(train, without=may_change).items()}
    settings |= {f"lora.{k}": v for k, v in (identity_of(recipe.lora) if recipe.lora else {}).items()}
    return json.loads(json.dumps(settings))  # as read from a manifest: tuples become lists


def teacher_fingerprint(recipe: Recipe, data_sha256: str) -> dict[str, str | int | float]:
    """The values that a teacher's log-probabilities on the training data depend on."""
    return {
        "model.base": recipe.model.base,
        "model.revision": str(recipe.model.revision),
        "bf16": str(trains_in_bf16(recipe)),
        "SHA-256 of the training data": data_sha256,
    }


def _division_that_matters(recipe: Recipe, train: Train, count: int) -> Settings:
    """The number of processes and the micro-batch, where a resume with others would differ: the batch itself is always the same."""
    drawn = "dropout" if recipe.lora is not None and recipe.lora.dropout > 0 else ""
    drawn = "noise for train.trl.neftune_noise_alpha" if train.trl.get("neftune_noise_alpha") else drawn
    by_micro_batch: Settings = {"train.micro_batch_size": train.micro_batch_size} if drawn else {}
    if train.deepspeed is not None:
        return {"number of processes, among which DeepSpeed splits the optimizer's states": count, **by_micro_batch}
    return {f"number of processes, each of which draws its own {drawn}": count, **by_micro_batch} if drawn else {}
