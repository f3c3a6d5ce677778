"""pydantic's errors as faults in a user's words, all at once: placeholders take the place of faulty values."""

import typing
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lt_train.recipe.faults import Fault, did_you_mean
from lt_train.recipe.part import COLLECTING, Part, parts_in
from lt_train.recipe.yaml_text import Path, dotted, pattern
from lt_train.runtime.errors import shown

Schema = TypeVar("Schema", bound=Part)

KINDS = {
    "int_type": ("not a whole number", "write digits alone, such as 16"),
    "float_type": ("not a number", "write a number, such as 0.5"),
    "string_type": ("not text", "put it in quotes"),
    "bool_type": ("neither true nor false", "write true or false"),
    "list_type": ("not a list", "write a list, such as [a, b]"),
    "dict_type": ("not a mapping", "write names and values, such as {{name: value}}"),
    "model_type": ("not a mapping", "write settings by name, such as {{name: value}}"),
    "model_attributes_type": ("not a mapping", "write settings by name, such as {{name: value}}"),
    "finite_number": ("not a finite number", "write a finite number"),
    "greater_than": ("not above {gt:g}", "set it above {gt:g}"),
    "greater_than_equal": ("less than {ge:g}", "set it to {ge:g} or more"),
    "less_than": ("not below {lt:g}", "set it below {lt:g}"),
    "less_than_equal": ("more than {le:g}", "set it to {le:g} or less"),
    "string_pattern_mismatch": (
        "not usable as the name of a folder",
        "start with a letter or digit, and continue with letters, digits, '.', '_' or '-'",
    ),
    "string_too_long": ("longer than {max_length} characters", "shorten it"),
    "string_too_short": ("empty", "write at least {min_length} character"),
    "byte_size": ("not a size in bytes", "write a number and a unit, such as 8GiB"),
    "byte_size_unit": ("not a size in bytes", "write a number and a unit, such as 8GiB"),
    "too_short": ("empty", "list at least {min_length} item"),
    "too_long": ("more than {max_length} item", "keep {max_length}"),
}
"""Type of pydantic's error -> the problem and the fix."""

MISSING = {
    "model.rope_scaling.rope_type": "set it to yarn, as Qwen's model cards do, or to linear",
    "model.rope_scaling.factor": "set it to the longest context over the base's own, such as 4.0",
    "name": "name the run; its folder is runs/<name>/",
    "model": "name the full-attention model: model.base, a hub id or a local folder",
    "model.base": "name the full-attention model: a hub id or a local folder",
    "hybrid": "choose the layers that stream, such as hybrid: {lazy_layer_ratio: 0.5}",
    "data": "name the training data: data.source, data.format and data.max_length",
    "data.source": "name the training data: a hub id, a file or a folder",
    "data.format": "name the fields of a row, such as still, messages or prompt_response",
    "data.max_length": "set it to the longest trace to train on, in tokens; TRL's own default truncates samples at 1024",
    "train.method": "choose lora or full",
    "train.learning_rate": "1e-5 is usual for full fine-tuning, 1e-4 for LoRA",
    "train.probes.steps": "set the optimizer steps between two probes",
    "train.probes.evals.*.benchmark": "name what is measured",
    "sample.benchmark": "name the problems to answer",
    "train.probes.evals": "list what to evaluate, such as [{benchmark: needle, recall: {lengths: [2048]}}]",
}
"""Required setting -> the fix where it is missing."""

STAND_INS = {
    "name": "unnamed",
    "model": {"base": "unknown"},
    "base": "unknown",
    "hybrid": {},
    "data": {"source": "unknown", "format": "still", "max_length": 2},
    "source": "unknown",
    "format": "still",
    "max_length": 2,
    "method": "full",
    "learning_rate": 1.0,
    "steps": 1,
    "evals": [{"benchmark": "needle"}],
    "evals.*": {"benchmark": "needle"},
    "eval.*": {"benchmark": "heldout_loss"},
    "benchmark": "needle",
    "rope_type": "yarn",
    "factor": 2.0,
}
"""Placeholders of faulty settings without a default, by name, so that the rest is checked; no such recipe is returned."""

NAMES_ELSEWHERE = {
    "model.base": ("model_name_or_path", "model_id", "base_model", "pretrained_model_name_or_path"),
    "model.dtype": ("bf16", "fp16", "torch_dtype", "precision"),
    "model.attention": ("attn_implementation", "flash_attention", "use_flash_attention_2"),
    "hybrid.w_recent": ("sliding_window", "window", "window_size", "recent_size"),
    "hybrid.w_sink": ("sink_size", "num_sinks", "keep_first", "start_size"),
    "hybrid.layers": ("lazy_layers", "sliding_layers", "streaming_layers"),
    "hybrid.streaming_kv_heads": ("heads", "kv_heads", "lazy_heads", "streaming_heads"),
    "data.source": ("dataset", "datasets", "dataset_name", "train_file", "data_path"),
    "data.max_length": ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"),
    "data.packing": ("sample_packing", "packing_strategy"),
    "data.heldout": ("val_size", "val_set_size", "test_size", "eval_dataset"),
    "train.epochs": ("num_train_epochs", "num_epochs"),
    "train.max_steps": ("total_steps", "training_steps"),
    "train.batch_size": ("gradient_accumulation_steps", "global_batch_size", "train_batch_size"),
    "train.micro_batch_size": ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    "train.learning_rate": ("lr",),
    "train.lr_scheduler": ("lr_scheduler_type",),
    "train.warmup_ratio": ("warmup_steps",),
    "train.gradient_checkpointing": ("activation_checkpointing",),
    "train.keep_checkpoints": ("save_total_limit",),
    "train.sequence_parallel": ("sequence_parallel_size", "context_parallel_size", "sp_size"),
    "lora.rank": ("r", "lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.targets": ("target_modules", "lora_target_modules", "lora_target"),
    "eval.*.max_new_tokens": ("max_gen_toks", "max_completion_tokens"),
    "eval.*.samples": ("num_samples", "num_return_sequences"),
    "track.wandb": ("report_to", "wandb_mode"),
    "track.project": ("wandb_project", "project_name"),
    "name": ("run_name", "output_dir", "experiment"),
}
"""Setting -> what transformers, TRL, PEFT, DeepSpeed, vLLM and other trainers call it, where that is no setting of ours."""

MOST_LISTED = 8
"""Of more allowed values than these only the one that may have been meant is named."""


def validate_all(schema: type[Schema], values: dict[str, Any]) -> tuple[Schema, list[Fault], list[str]]:
    """An instance of `schema`, every fault of `values`, and the settings that are a placeholder or the default in it."""
    faults: list[Fault] = []
    replaced: set[Path] = set()
    while True:
        try:
            return schema.model_validate(values, context=COLLECTING), faults, [dotted(path) for path in replaced]
        except ValidationError as error:
            found: dict[Path, Fault] = {}
            parts: dict[Path, type[Part]] = {}
            for details in error.errors(include_url=False):
                path, parts[path] = _locate(schema, details["loc"])
                found.setdefault(path, _fault(schema, details, path, parts[path]))
            if replaced >= found.keys():
                raise  # a placeholder is itself faulty: a bug here, not the user's mistake
            faults += [fault for path, fault in found.items() if not any(known[: len(path)] == path for known in replaced)]
            for path in reversed(found):  # from a list's end, where removing one item moves no other
                values = _with_stand_in(values, path, parts[path])
            replaced |= found.keys()


def _with_stand_in(values: Any, path: Path, part: type[Part], above: str | int = "") -> Any:
    """`values` with a placeholder at `path`, whose part is given, or without it where the default serves."""
    copied, name = values.copy(), path[0]
    if len(path) > 1:
        copied[name] = _with_stand_in(values[name], path[1:], part, name)
    elif isinstance(name, int) and f"{above}.*" in STAND_INS:
        copied[name] = STAND_INS[f"{above}.*"]
    elif name in part.model_fields and part.model_fields[name].is_required():
        copied[name] = STAND_INS[name]
    else:
        del copied[name]
    return copied


def _locate(schema: type[Part], loc: tuple[str | int, ...]) -> tuple[Path, type[Part]]:
    """The path that pydantic's location means, and the part of the schema around it.

    Where a list holds parts of several kinds, pydantic puts the kind, a benchmark's name, behind the index.
    """
    path: Path = ()
    around, parts = schema, [schema]
    for name in loc:
        if isinstance(name, str) and len(parts) > 1:
            parts = [part for part in parts if name in typing.get_args(part.model_fields["benchmark"].annotation)]
            continue
        path = (*path, name)
        if isinstance(name, str):
            around = parts[0]
            parts = parts_in(around.model_fields[name].annotation) if name in around.model_fields else []
    return path, around


def _fault(schema: type[Part], details: ErrorDetails, path: Path, around: type[Part]) -> Fault:
    setting, kind, given, context = dotted(path), details["type"], shown(details["input"]), details.get("ctx", {})
    if kind == "extra_forbidden":
        return Fault((setting,), *_unknown(schema, path, around))
    if kind == "missing" or (details["input"] is None and pattern(path) in MISSING):
        return Fault((setting,), "missing", MISSING[pattern(path)])
    if kind == "union_tag_not_found":
        return Fault((f"{setting}.benchmark",), "missing", "name what is measured")
    if kind == "union_tag_invalid":
        return Fault((f"{setting}.benchmark",), *_unknown_value(context["tag"], context["expected_tags"]))
    if kind == "literal_error":
        return Fault((setting,), *_unknown_value(details["input"], context["expected"]))
    if kind == "fault":  # of the schema's own validators
        return Fault((setting,), f"{given}: {context['problem']}", context["fix"])
    problem, fix = KINDS.get(kind, (details["msg"], ""))
    return Fault((setting,), f"{given}: {problem.format(**context)}", fix.format(**context))


def _unknown_value(given: Any, expected: str) -> tuple[str, str]:
    """The problem and the fix where none of the expected values is given."""
    allowed = expected.replace("'", "").replace(" or ", ", ").split(", ")
    close = did_you_mean(given, allowed) if len(allowed) > MOST_LISTED else ""
    return f"{shown(given)}: unknown{close}", "" if close else f"use one of {', '.join(allowed)}"


def _unknown(schema: type[Part], path: Path, part: type[Part]) -> tuple[str, str]:
    """The problem and the fix of an unknown setting: a similar name of the same part may be meant, or the same name elsewhere."""
    name, settings = str(path[-1]), all_settings(schema)
    if pattern(path) in settings:
        return "unknown setting of this benchmark", f"remove it; there are {', '.join(part.model_fields)}"
    elsewhere = [setting for setting in settings if setting.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown setting here; did you mean {min(elsewhere, key=lambda setting: setting.count('.'))}?", ""
    if meant := next((setting for setting, names in NAMES_ELSEWHERE.items() if name in names), None):
        return f"unknown setting; here it is {meant}", ""
    if close := did_you_mean(name, part.model_fields):
        return f"unknown setting{close}", ""
    return "unknown setting", f"use one of {', '.join(part.model_fields)}"


@cache
def all_settings(schema: type[Part], above: str = "") -> tuple[str, ...]:
    """Every setting by its dotted path, "*" for the index in a list of parts."""
    names: list[str] = []
    for name, field in schema.model_fields.items():
        index = "*." if typing.get_origin(field.annotation) is list else ""
        inner = [setting for part in parts_in(field.annotation) for setting in all_settings(part, f"{above}{name}.{index}")]
        names += inner or [f"{above}{name}"]
    return tuple(names)
