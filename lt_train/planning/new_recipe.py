"""`lt-train init`: a recipe for a base and data, after a look at both, whose training fits the machine by `lt-train plan`.

Each value has a comment with its source. A recipe that comes with lt_train may be the start (`--from`): then what
data, base and machine do not decide is as there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lt_train.hybrid.context_length import context_length
from lt_train.inference.loading import eos_ids, load_base_config
from lt_train.inference.tokenizer import has_local_tokenizer, load_checked_tokenizer
from lt_train.planning.data_survey import BYTES_PER_TOKEN, DataSurvey, survey_data
from lt_train.planning.draft import Draft
from lt_train.planning.fitting import FittingTraining, fitting_calibration, fitting_training
from lt_train.planning.plan import RecipePlan, plan_recipe
from lt_train.planning.setup import GPU_GIB, Machine
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.part import former_names
from lt_train.recipe.schema import Model, Prompt, Recipe
from lt_train.recipe.shipped import absolute_files, find_recipe, locate_files
from lt_train.recipe.yaml_text import read_recipe_text
from lt_train.runtime.errors import UserError, shortened
from lt_train.runtime.units import GIB, format_bytes

PAPER = "as in the paper (LightTransfer, arXiv 2410.13846)"
HELDOUT, CALIBRATION = 64, 64
BATCH = 32
KEPT = 0.99
"""Fraction of the samples that data.max_length holds, where they fit: one outlier is not to decide the memory of a training."""
OF_THE_BASE = ("chat_template", "stop_token")
"""Settings of the prompt that belong to another base."""

LEARNING = {
    "full": (1e-5, 3, "as STILL-3 trains on long reasoning", "as Sky-T1"),
    "lora": (1e-4, 1, "as SWAA (arXiv 2512.10411) adapts models to windows by LoRA", "as SWAA"),
}
"""Learning rate, epochs, and where each comes from."""


def write_recipe(out: Path, base: str, source: str, start: str | None, machine: Machine) -> RecipePlan:
    """
    Args:
        base, source: as in model.base and data.source, and given as `--base` and `--data`, which errors name.
        start: a recipe file, or the name of a recipe that comes with lt_train. None: the paper's settings.

    Raises:
        UserError: `out` exists; a base that cannot become a hybrid; data that cannot be read or hold no reasoning; no training
            fits. Nothing is written then.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already, and is not overwritten. Fix: name another file, or remove this one")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.absolute().parent}. Fix: make it, or name a file in another")
    draft = _start(start)
    with _errors_name("--base", base, setting="model.base"):
        model = Model(base=base)
        config = load_base_config(model)
        local = has_local_tokenizer(model)
        tokenizer = load_checked_tokenizer(model, config) if local else None
        eos = eos_ids(model) if local else ()
    prompt = Prompt.model_validate(draft.values.get("prompt", {}))
    context = context_length(config.to_dict())
    with _errors_name("--data", source, setting="data.source"):
        survey = survey_data(source, prompt, tokenizer, eos, context)
    _fill_from_base(draft, out, _from_folder_of(out, base), config, machine)
    _fill_from_data(draft, _from_folder_of(out, source), survey, context, from_recipe=start is not None)
    fitting = _fill_from_plan(draft, config, machine, survey, out, from_recipe=start is not None)
    text = _header(draft, out, start, machine, fitting) + draft.text()
    checked = _checked(text, out)
    plan = plan_recipe(checked, machine, survey.rows, min(survey.median, checked.data.max_length))
    assert plan.works, "the same code has found a training that fits"
    with open(out, "x", encoding="utf-8") as file:
        file.write(text)
    return plan


@contextmanager
def _errors_name(option: str, value: str, *, setting: str) -> Iterator[None]:
    """Name the option that was typed in errors that name the recipe's setting, or begin with its value."""
    if not value:
        raise UserError(f"{option}: '': empty. Fix: give a local path or a hub id")
    try:
        yield
    except UserError as error:
        message = str(error).replace(setting, option)
        begins_with_value = message.startswith((value, shortened(value), str(Path(value).expanduser())))
        raise UserError(f"{option}: {message}" if begins_with_value else message) from error


# The start


def _start(start: str | None) -> Draft:
    if start is not None:
        return Draft(_settings_of(start))
    draft = Draft({"seed": 0})
    for name, value in (("lazy_layer_ratio", 0.5), ("w_sink", 4), ("w_recent", 1020)):
        draft.set(f"hybrid.{name}", value, PAPER)
    draft.set("hybrid.strategy", "reach", "layers stream that the distant context needs least")
    draft.set("train.lr_scheduler", "cosine")
    draft.set("train.warmup_ratio", 0.1)
    draft.set("train.save_steps", 25)
    draft.set("train.eval_steps", 25)
    draft.set("eval", [{"benchmark": "heldout_loss", "variants": ["base", "converted", "trained"], "batch_size": 1}])
    draft.reasons["eval"] = "the loss on data.heldout; add benchmarks such as {benchmark: math500, variants: [base, trained]}"
    draft.set("track", {"wandb": "off"})
    return draft


def _settings_of(start: str) -> dict[str, Any]:
    """The recipe's settings, without those of its own base and data."""
    path = find_recipe(Path(start), "--from")
    recipe = load_recipe(path)
    if recipe.train is None:
        raise UserError(f"--from: {start}: this recipe trains nothing. Fix: name one that has a train part")
    written = read_recipe_text(path.read_text(encoding="utf-8"), former_names=former_names(Recipe)).values
    values = absolute_files(locate_files(written, path))
    kept = {name: value for name, value in values.items() if name not in ("name", "model", "data", "sample")}
    kept["model"] = {name: value for name, value in values["model"].items() if name in ("dtype", "attention")}
    kept["data"] = {name: value for name, value in values["data"].items() if name in ("overlong", "packing")}
    kept["prompt"] = {name: value for name, value in (values.get("prompt") or {}).items() if name not in OF_THE_BASE}
    return kept


# What base, data and plan decide


def _fill_from_base(draft: Draft, out: Path, base: str, config: PreTrainedConfig, machine: Machine) -> None:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-")[:100] or "hybrid"
    draft.set("name", name, f"the run's folder is runs/{name}")
    metadata = f"{config.model_type}, {config.num_hidden_layers} layers, context of {context_length(config.to_dict()):,} tokens"
    draft.set("model.base", base, metadata)
    if "dtype" not in draft.values["model"] and not machine.cpu:
        draft.set("model.dtype", "bf16", "GPUs compute in it")


def _fill_from_data(draft: Draft, source: str, survey: DataSurvey, context: int, from_recipe: bool) -> None:
    looked = f"{survey.looked_at:,} of {survey.rows:,} rows" if survey.looked_at < survey.rows else f"all {survey.rows:,} rows"
    draft.set("data.source", source, f"{looked} looked at: {survey.with_reasoning:,} samples with reasoning")
    draft.set("data.format", survey.format, survey.chosen.removeprefix(f"data.format {survey.format} ").strip("()"))
    if survey.converted is not None:
        draft.set("data.reasoning_tags", "convert", survey.converted)
    elif not survey.counted:
        draft.set("data.reasoning_tags", None, "set convert, should the run report other tags than the base's")
    if survey.faulty.count:
        first = survey.faulty.lines()[0]
        draft.set("data.faulty", "drop", f"{survey.faulty.count:,} of the rows looked at cannot be trained on: {first}")
    wanted = survey.quantile(KEPT)
    step = 1024 if wanted > 1024 else 64
    draft.set("data.max_length", min(math.ceil(wanted / step) * step, context), _lengths(survey))
    draft.values["data"].setdefault("overlong", "drop")
    heldout = max(1, min(HELDOUT, survey.rows // 10))
    draft.set("data.heldout", heldout, "rows that are not trained on, for the evaluation loss")
    hybrid = draft.values["hybrid"]
    if not from_recipe or hybrid.get("w_sink", 4) + hybrid.get("w_recent", 1020) >= survey.median:
        _fill_window(draft, survey)
    samples = max(1, min(CALIBRATION, survey.rows - heldout))
    draft.set("hybrid.calibration", {**hybrid.get("calibration", {}), "samples": samples})


def _lengths(survey: DataSurvey) -> str:
    how = "by the base's tokenizer" if survey.counted else f"estimated, {BYTES_PER_TOKEN} bytes a token: no local tokenizer"
    most = f"{100 * KEPT:.0f} % have at most {survey.quantile(KEPT):,}"
    return f"tokens of a sample: median {survey.median:,}, {most}, the longest {survey.lengths[-1]:,} ({how})"


def _fill_window(draft: Draft, survey: DataSurvey) -> None:
    """The paper's 1,024 tokens in all, or an eighth of a sample where samples are short."""
    sinks = draft.values["hybrid"].get("w_sink", 4)
    window = 1024
    if survey.median < 4 * window:
        window = max(2 ** int(math.log2(max(survey.median / 8, 1))), 2 * sinks, 8)
        reason = f"with w_sink about an eighth of the median sample ({survey.median:,} tokens): 1,020 would show most of it"
        draft.set("hybrid.w_recent", window - sinks, reason)


def _fill_from_plan(
    draft: Draft, config: PreTrainedConfig, machine: Machine, survey: DataSurvey, out: Path, from_recipe: bool
) -> FittingTraining:
    """
    Raises:
        UserError: neither full fine-tuning nor LoRA fits, or scoring the layers does not.
    """
    train = draft.values["train"]
    if machine.gpus % train.get("sequence_parallel", 1):
        draft.set("train.sequence_parallel", 1, f"{machine.gpus} processes form no groups of {train['sequence_parallel']}")
    _fill_batch(draft, machine, survey)
    first = str(train.get("method", "lora" if machine.cpu else "full"))
    methods = [first] if first == "lora" else [first, "lora"]
    drafts = {method: _with_method(draft.values, method, from_recipe) for method in methods}
    recipes = {method: Draft(drafts[method]).recipe(out) for method in methods}
    on = "this machine's CPU" if machine.cpu else _gpus(machine)
    fitting = fitting_training(list(recipes.values()), config, machine, shortest=survey.median)
    if fitting is None:
        raise UserError(
            f"--base: {draft.values['model']['base']}: no training of it fits {on}, not even LoRA on samples of "
            f"{survey.median:,} tokens. Fix: give more GPUs (--gpus) or larger ones (--gpu-memory), or shorter samples"
        )
    method = next(name for name, recipe in recipes.items() if recipe is fitting.recipe)
    draft.values = drafts[method]
    _explain_method(draft, method, first, on, machine, from_recipe)
    peak = f"{format_bytes(fitting.peak)} of {format_bytes(machine.usable)} (lt-train plan)"
    micro = fitting.option.micro_batch
    draft.set("train.micro_batch_size", micro, f"the largest that fits: {peak}")
    needed = "without it no micro-batch fits" if fitting.checkpointing else "not needed: all activations fit"
    draft.set("train.gradient_checkpointing", fitting.checkpointing, needed)
    sharding = fitting.option
    if sharding.file == "null":
        draft.set("train.deepspeed", None, "not needed: each GPU holds all of it" if machine.gpus > 1 else None)
    else:
        host = f", {format_bytes(sharding.host)} of host memory" if sharding.host else ""
        draft.set("train.deepspeed", sharding.file, f"{sharding.sharding.name}{host}: less does not fit")
    if fitting.length < draft.values["data"]["max_length"]:
        longer = f"{survey.longer_than(fitting.length):,} of {len(survey.lengths):,} samples looked at are longer, and left out"
        draft.set("data.max_length", fitting.length, f"the longest that fits {on}: {longer}; {_lengths(survey)}")
    _fill_calibration(draft, config, machine, out, on)
    return fitting


def _fill_calibration(draft: Draft, config: PreTrainedConfig, machine: Machine, out: Path, on: str) -> None:
    length = fitting_calibration(draft.recipe(out), config, machine)
    if length is None:
        raise UserError(
            f"--base: {draft.values['model']['base']}: scoring its layers does not fit {on}. Fix: give more GPUs (--gpus), or "
            "name a recipe by --from that names layers"
        )
    if length < draft.values["data"]["max_length"]:
        given = {**draft.values["hybrid"]["calibration"], "max_length": length}
        draft.set("hybrid.calibration", given, f"scoring the layers on longer samples does not fit {on}")


def _fill_batch(draft: Draft, machine: Machine, survey: DataSurvey) -> None:
    """A batch that the processes divide, small enough for ten steps an epoch where rows are few."""
    train = draft.values["train"]
    train.pop("batch_tokens", None)
    groups = machine.gpus // train.get("sequence_parallel", 1)
    wanted = train.get("batch_size") or min(BATCH, 2 ** int(math.log2(max(survey.rows / 10, 1))))
    batch = math.ceil(wanted / groups) * groups
    if batch != train.get("batch_size"):
        divided = f", divided among {groups} processes" if groups > 1 else ""
        draft.set("train.batch_size", batch, f"{survey.rows:,} rows give {survey.rows // batch:,} steps an epoch{divided}")
    draft.set("train.micro_batch_size", 1)


def _with_method(values: Mapping[str, Any], method: str, from_recipe: bool) -> dict[str, Any]:
    """The settings for a method; those of the recipe that is the start stay where it has this method."""
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    train = changed["train"]
    if not (from_recipe and train.get("method") == method):
        train |= {"method": method, "learning_rate": LEARNING[method][0]}
        if "max_steps" not in train:
            train["epochs"] = LEARNING[method][1]
        if method == "lora":
            train.pop("parameters", None)
            train.pop("restore_query_key", None)
            changed["lora"] = {"rank": 16, "alpha": 32, "layers": "lazy"}
        else:
            changed.pop("lora", None)
    if train.get("sequence_parallel", 1) == 1:  # else the schema requires some configuration
        train["deepspeed"] = None
    return changed


def _explain_method(draft: Draft, method: str, first: str, on: str, machine: Machine, from_recipe: bool) -> None:
    if from_recipe and method == first:
        return
    if method != first:
        why = f"full fine-tuning does not fit {on}"
    else:
        why = "full fine-tuning would take long on a CPU" if machine.cpu else f"full fine-tuning, as in the paper, fits {on}"
    draft.reasons["train.method"] = why
    draft.reasons["train.learning_rate"] = LEARNING[method][2]
    if "epochs" in draft.values["train"]:
        draft.reasons["train.epochs"] = LEARNING[method][3]
    if method == "lora":
        draft.reasons["lora.layers"] = "adapters on the streaming layers alone: the others stay as they are"


# Files


def _checked(text: str, out: Path) -> Recipe:
    """Read as `lt-train validate` reads it, under another name in the same folder."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}. Fix: name a file in another folder") from error
        return load_recipe(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _from_folder_of(out: Path, name: str) -> str:
    """A hub id as it is; a local path from the recipe's folder if it is below it, so that both may move; else absolute."""
    path, folder = Path(name).expanduser().absolute(), out.absolute().parent
    if not path.exists():
        return name
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _header(draft: Draft, out: Path, start: str | None, machine: Machine, fitting: FittingTraining) -> str:
    count = machine.gpus
    on = "a CPU" if machine.cpu else _gpus(machine)
    model, data = draft.values["model"]["base"], draft.values["data"]["source"]
    lines = [f"{model} becomes a hybrid, trained on {data}, on {on}.", "Written by lt-train init. Change what you like, then:"]
    memory = "" if machine.memory == GPU_GIB * GIB else f" --gpu-memory {machine.memory / GIB:.0f}"
    lines.append(f"  lt-train plan {out} --gpus {count}{memory}" + (" --cpu" if machine.cpu else ""))
    if count > 1 or fitting.option.file != "null":
        lines.append(f"  deepspeed --num_gpus {count} --module lt_train train {out}     # then evaluate and export:")
    lines.append(f"  lt-train run {out}")
    if start is not None:
        lines.append(f"Settings without a comment are those of {start}.")
    return "".join(f"# {line}\n" for line in lines) + "\n"


def _gpus(machine: Machine) -> str:
    return f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} of {format_bytes(machine.memory)}"
