"""Arguments and names that TRL, PEFT, DeepSpeed and transformers accept, looked up in the installed classes.

Importing these libraries takes seconds. So a recipe without `trl:` and `peft:` and with common names imports none of them.
"""

import dataclasses
import json
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any, Union

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from lt_train.recipe.faults import Fault, did_you_mean
from lt_train.runtime.errors import shown

COMMON_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay")
"""Names of transformers' SchedulerType that are known without importing it."""

COMMON_ZERO_SETTINGS = frozenset(
    """
    stage contiguous_gradients overlap_comm reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size
    offload_param offload_optimizer sub_group_size round_robin_gradients stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_gather_16bit_weights_on_model_save
    """.split()  # noqa: SIM905
)
"""Names of DeepSpeed's zero_optimization that are known without importing it."""


def unknown_scheduler(name: str) -> str | None:
    """The fault in the name of a learning rate schedule; None: transformers has it."""
    if name in COMMON_SCHEDULERS:
        return None
    from transformers.trainer_utils import SchedulerType

    return _unknown(name, [kind.value for kind in SchedulerType], "scheduler of transformers")


def unknown_zero_setting(name: str) -> str | None:
    """The fault in the name of a setting of zero_optimization; None: DeepSpeed has it."""
    if name in COMMON_ZERO_SETTINGS:
        return None
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    return _unknown(name, names, "setting of DeepSpeed")


def _unknown(name: str, names: list[str], what: str) -> str | None:
    if name in names:
        return None
    return f"no {what}" + (did_you_mean(name, names) or f". Fix: use one of {', '.join(sorted(names))}")


def trl_faults(given: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of `train.trl`."""

    def sft_config() -> type:
        from trl import SFTConfig

        return SFTConfig

    return _argument_faults("train.trl", given, TRL_SET_BY_RECIPE, sft_config)


def peft_faults(given: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of `lora.peft`."""

    def lora_config() -> type:
        from peft import LoraConfig

        return LoraConfig

    return _argument_faults("lora.peft", given, PEFT_SET_BY_RECIPE, lora_config)


def _argument_faults(
    setting: str, given: Mapping[str, Any], elsewhere: Mapping[str, str], load: Callable[[], type]
) -> Iterator[Fault]:
    """Names that a config class does not have or that the recipe sets elsewhere, and values of another type than the class's."""
    ours = {name: value for name, value in given.items() if name not in elsewhere}
    for name in given.keys() - ours.keys():
        instead = elsewhere[name]
        problem, fix = ("not set here", instead) if instead.startswith("use ") else (f"not set here; {instead}", "remove it")
        yield Fault((f"{setting}.{name}",), problem, fix)
    if not ours:
        return
    config = load()
    hints = _type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.init and field.name not in elsewhere]
    for name, value in ours.items():
        if name not in names:
            yield Fault((f"{setting}.{name}",), f"no argument of {config.__name__}{did_you_mean(name, names)}")
        elif expected := _refused(hints[name], value):
            yield Fault((f"{setting}.{name}",), f"{shown(value)}: not a value for {config.__name__}", f"set it to {expected}")


@cache
def _type_hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _refused(hint: Any, value: Any) -> str | None:
    """The values that a type accepts, where it refuses one from YAML; None: it accepts it. A name must be one of an Enum's."""
    options = typing.get_args(hint)
    if str in options and any(isinstance(option, type) and issubclass(option, Enum) for option in options):
        hint = Union[tuple(option for option in options if option is not str)]  # noqa: UP007
    if any("[" in choice and str(value).startswith(choice.partition("[")[0]) for choice in _choices(hint)):
        return None  # PEFT's Literal holds a placeholder: "pissa_niter_[number of iters]"
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a dataclass, which has a config of its own
        adapter = TypeAdapter(hint)
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except TypeError:  # a date, which JSON cannot hold
        return "a number, a text, true or false, a list or a mapping"
    except ValidationError as error:
        found = [details["msg"].removeprefix("Input should be ") for details in error.errors()]
        wanted = dict.fromkeys(message.replace("an object", "a mapping") for message in found)
        return textwrap.shorten(" or ".join(wanted), 150, placeholder=" …")
    return None


def _choices(hint: Any) -> list[str]:
    """The texts that the Literals in an annotation allow."""
    inner = typing.get_args(hint)
    return [choice for item in inner for choice in ([item] if isinstance(item, str) else _choices(item))]


TRL_SET_BY_RECIPE = {
    "output_dir": "use name; the run is written to runs/<name>/",
    "run_name": "use name",
    "seed": "use seed",
    "data_seed": "use seed",
    "bf16": "use model.dtype",
    "fp16": "use model.dtype",
    "bf16_full_eval": "use model.dtype",
    "fp16_full_eval": "use model.dtype",
    "trust_remote_code": "use model.trust_remote_code",
    "model_init_kwargs": "use the settings of `model`",
    "max_length": "use data.max_length",
    "truncation_mode": "use data.overlong",
    "packing": "use data.packing",
    "packing_strategy": "use data.packing",
    "eval_packing": "use data.packing",
    "padding_free": "use data.packing",
    "dataset_text_field": "use data.format",
    "dataset_kwargs": "use data.format",
    "chat_template_path": "use prompt.chat_template",
    "completion_only_loss": "the loss is on the answer alone",
    "assistant_only_loss": "the loss is on the answer alone",
    "eos_token": "the answer ends with the token that ends a turn in the chat template",
    "learning_rate": "use train.learning_rate",
    "num_train_epochs": "use train.epochs",
    "max_steps": "use train.max_steps",
    "per_device_train_batch_size": "use train.micro_batch_size",
    "gradient_accumulation_steps": "use train.batch_size and train.micro_batch_size",
    "per_device_eval_batch_size": "use train.micro_batch_size",
    "auto_find_batch_size": "use train.micro_batch_size",
    "lr_scheduler_type": "use train.lr_scheduler",
    "warmup_steps": "use train.warmup_ratio",
    "weight_decay": "use train.weight_decay",
    "max_grad_norm": "use train.max_grad_norm",
    "gradient_checkpointing": "use train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "use train.gradient_checkpointing",
    "activation_checkpointing": "use train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "use train.gradient_checkpointing",
    "save_strategy": "use train.save_steps",
    "save_steps": "use train.save_steps",
    "save_total_limit": "use train.keep_checkpoints",
    "save_only_model": "a checkpoint must hold all that resuming needs",
    "ignore_data_skip": "a resumed run continues in the same order of data",
    "resume_from_checkpoint": "a run resumes from its last valid checkpoint by itself",
    "eval_strategy": "use train.eval_steps",
    "eval_steps": "use train.eval_steps",
    "logging_strategy": "use train.logging_steps",
    "logging_steps": "use train.logging_steps",
    "logging_nan_inf_filter": "a loss of NaN must show",
    "include_num_input_tokens_seen": "tokens are always counted",
    "disable_tqdm": "progress is shown by lt-train",
    "report_to": "use track.wandb, track.tensorboard and track.trackio",
    "project": "use track.project",
    "deepspeed": "use train.deepspeed",
    "ddp_find_unused_parameters": "every trained weight takes part in each step",
    "use_cpu": "the CPU is used where there is no accelerator",
    "parallelism_config": "context parallelism drops the mask of streaming layers",
    "use_cache": "training keeps no cache",
    "do_train": "use the commands of lt-train",
    "do_eval": "use the commands of lt-train",
    "do_predict": "use the commands of lt-train",
}
"""Arguments of SFTConfig that a recipe sets elsewhere: name -> "use …", or why not."""

PEFT_SET_BY_RECIPE = {
    "r": "use lora.rank",
    "lora_alpha": "use lora.alpha",
    "lora_dropout": "use lora.dropout",
    "target_modules": "use lora.targets",
    "layers_to_transform": "use lora.layers",
    "layers_pattern": "use lora.layers",
    "base_model_name_or_path": "use model.base",
    "revision": "use model.revision",
    "task_type": "the task is causal language modelling",
    "peft_type": "the adapter is LoRA",
    "peft_version": "PEFT writes it",
    "auto_mapping": "PEFT writes it",
    "inference_mode": "use the commands of lt-train",
    "layer_replication": "it would change which layers stream",
}
"""Arguments of LoraConfig that a recipe sets elsewhere: name -> "use …", or why not."""
