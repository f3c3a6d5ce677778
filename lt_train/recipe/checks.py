"""Checks of settings of several parts, and of names and files that must exist. The schema checks each part by itself."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from lt_train.recipe.deepspeed_file import contradictions, read_deepspeed_file
from lt_train.recipe.evaluations import BASE, CONVERTED, HELDOUT, TRAINED, Eval
from lt_train.recipe.faults import Fault, nearest_multiples
from lt_train.recipe.part import all_parts
from lt_train.recipe.schema import EVAL_LOSS, PER_PROMPT, Evaluation, Lora, Recipe, Train
from lt_train.recipe.upstream import peft_faults, trl_faults, unknown_scheduler
from lt_train.runtime.errors import UserError, shortened, shown
from lt_train.runtime.sources import resolve_data, resolve_model
from lt_train.runtime.text_files import text_files

BASE_STAYS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base's weights as they are; the others move a part of them into the adapter."""


def all_conflicts(recipe: Recipe) -> Iterator[Fault]:
    """Every contradiction between settings, those inside one part included, and every file or name that does not exist."""
    for path, part in all_parts(recipe):
        for fault in part.conflicts():
            yield replace(fault, settings=tuple(f"{path}.{setting}" if path else setting for setting in fault.settings))
    yield from chain(_sources(recipe), _files(recipe), _trackers(recipe), _evaluations(recipe), _drafts(recipe))
    if recipe.data.source is None:
        yield from _without_traces(recipe)
    if recipe.hybrid.select == PER_PROMPT:
        yield from _chosen_by_prompts(recipe)
    if recipe.train is not None:
        yield from chain(_training(recipe, recipe.train), _distillation(recipe, recipe.train))
    if recipe.lora is not None:
        yield from _lora(recipe, recipe.lora)


def remarks_on(recipe: Recipe) -> Iterator[Fault]:
    """Remarks on settings that work with some servers only, for `validate` to report before anything runs."""
    for path, evaluation in _generations_and_losses(recipe):
        served = isinstance(evaluation, Eval) and evaluation.backend == "openai" and evaluation.variants != [BASE]
        if served and recipe.hybrid.granularity == "kv_head":
            problem = "of servers, lt-train serve and vLLM with its plugin alone load an export of which single KV heads stream"
            yield Fault((f"{path}.backend", "hybrid.granularity"), problem, "serve it with lt-train serve, with --vllm or without")


def _sources(recipe: Recipe) -> Iterator[Fault]:
    model, data = recipe.model, recipe.data
    names: list[tuple[str, str, Callable[[str], Path | str]]] = [("model.base", model.base, resolve_model)]
    names += [] if data.source is None else [("data.source", data.source, resolve_data)]
    names += [(f"{path}.path", part.path, resolve_data) for path, part in all_parts(recipe) if isinstance(part, Eval) and part.path]
    local: dict[str, Path] = {}
    for setting, name, resolve in names:
        try:
            local[setting] = Path(resolve(name))
        except UserError as error:
            yield Fault((setting,), str(error))
    if model.revision is not None and "model.base" in local and local["model.base"].is_dir():
        yield Fault(("model.revision", "model.base"), "a local folder has no revisions", "set model.revision to null")
    if data.subset is not None and "data.source" in local and local["data.source"].is_file():
        yield Fault(("data.subset", "data.source"), "a file has no subsets", "set data.subset to null")
    if data.split != "train" and "data.source" in local and local["data.source"].is_file():
        yield Fault(("data.split", "data.source"), "a file has no splits", "remove data.split")
    if recipe.hybrid.calibration.source is not None:
        try:
            text_files(recipe.hybrid.calibration.source)
        except UserError as error:
            yield Fault(("hybrid.calibration.source",), str(error))


def _without_traces(recipe: Recipe) -> Iterator[Fault]:
    """Faults of settings that need traces, in a recipe without data.source."""
    hybrid, name = recipe.hybrid, "name the traces"
    if recipe.train is not None:
        yield Fault(("data.source", "train"), "missing, so there is nothing to train on", f"{name}, or remove train")
    if recipe.data.heldout:
        yield Fault(("data.source", "data.heldout"), "missing, so nothing can be held out", f"{name}, or remove heldout")
    if hybrid.calibration.source is not None:
        return
    if scoring := [strategy for strategy in (hybrid.strategy, *hybrid.compare) if strategy not in (None, "periodic", "random")]:
        problem = f"missing, so {scoring[0]} has no samples to score the layers on"
        yield Fault(("data.source", "hybrid.calibration.source"), problem, f"{name}, or texts in hybrid.calibration.source")
    elif hybrid.sink == "learned":
        problem = "missing, so learned sinks have no samples to be fitted on"
        yield Fault(("data.source", "hybrid.calibration.source"), problem, f"{name}, or texts in hybrid.calibration.source")


def _files(recipe: Recipe) -> Iterator[Fault]:
    template, train = recipe.prompt.chat_template, recipe.train
    if template is not None and not os.path.isfile(template):
        yield Fault(
            ("prompt.chat_template",),
            f"{shortened(template)}: no such file (looked at {shortened(os.path.abspath(template), 300)})",
        )
    if train is not None and train.deepspeed is not None:
        try:
            found = list(contradictions(read_deepspeed_file(Path(train.deepspeed)), recipe))
        except UserError as error:
            yield Fault(("train.deepspeed",), str(error))
        else:
            yield from (Fault(("train.deepspeed",), f"{train.deepspeed}: {contradiction}") for contradiction in found)


def _trackers(recipe: Recipe) -> Iterator[Fault]:
    for name in ("tensorboard", "trackio"):
        if getattr(recipe.track, name) and find_spec(name) is None:
            yield Fault((f"track.{name}",), f"{name} is not installed", f"pip install 'lt-train[{name}]', or set it to false")


def _evaluations(recipe: Recipe) -> Iterator[Fault]:
    evaluations = _generations_and_losses(recipe)
    for path, evaluation in evaluations:
        if evaluation.benchmark in HELDOUT and recipe.data.heldout == 0:
            problem = f"no samples are held out for {evaluation.benchmark}"
            yield Fault((f"{path}.benchmark", "data.heldout"), problem, "set data.heldout above 0")
    for path, evaluation in evaluations:
        if recipe.train is None and TRAINED in (evaluation.variants or []):
            problem, fix = "this recipe trains nothing", "evaluate converted instead of trained, or add a train part"
            yield Fault((f"{path}.variants", "train"), problem, fix)


def _drafts(recipe: Recipe) -> Iterator[Fault]:
    """Faults of evaluations whose draft cannot draft for their models."""
    hybrid = recipe.hybrid
    for path, part in all_parts(recipe):
        if not isinstance(part, Eval) or part.draft is None:
            continue
        hybrids = [variant for variant in part.variants or [TRAINED] if variant != BASE]
        if part.draft_length is not None and part.draft_length >= hybrid.w_recent:
            problem = f"{part.draft_length:,} tokens are not within the window of {hybrid.w_recent:,}"
            yield Fault((f"{path}.draft_length", "hybrid.w_recent"), problem, f"set draft_length to at most {hybrid.w_recent - 1}")
        if hybrid.select == PER_PROMPT and (hybrids or part.draft == "hybrid"):
            problem, fix = "each prompt chooses the layers that stream", "remove draft, or set hybrid.select to static"
            yield Fault((f"{path}.draft", "hybrid.select"), problem, fix)
        elif part.draft == "hybrid" and hybrids:
            fix = "set draft to streaming, or variants to [base]"
            yield Fault((f"{path}.draft", f"{path}.variants"), "the hybrid would draft for itself", fix)
        elif hybrids and hybrid.sink == "learned":
            problem = "layers that stream in the draft alone have no learned sinks"
            yield Fault((f"{path}.draft", "hybrid.sink"), problem, "remove draft, or set sink to tokens")
        elif hybrids and part.draft_layers is not None and set(part.draft_layers) <= set(hybrid.layers or ()):
            problem, fix = "all of them stream in the hybrid, which would draft for itself", "name others, or remove draft_layers"
            yield Fault((f"{path}.draft_layers", "hybrid.layers"), problem, fix)


def _chosen_by_prompts(recipe: Recipe) -> Iterator[Fault]:
    """Faults of settings that need the streaming layers before the built-in engine reads a prompt that chooses them."""
    static = "set hybrid.select to static"
    if recipe.train is not None:
        problem = "each prompt chooses the layers that stream, so none can be trained for it"
        yield Fault(("train", "hybrid.select"), problem, f"remove train, or {static}")
    for path, evaluation in _generations_and_losses(recipe):
        if CONVERTED not in (evaluation.variants or []):
            continue
        if evaluation.benchmark in HELDOUT:
            problem = f"{evaluation.benchmark} generates nothing, and prompts choose layers for what follows them"
            yield Fault((f"{path}.benchmark", "hybrid.select"), problem, f"remove it, or {static}")
        elif isinstance(evaluation, Eval) and evaluation.backend != "hybrid":
            problem = "servers serve an export, and the built-in engine alone lets prompts choose layers"
            yield Fault((f"{path}.backend", "hybrid.select"), problem, f"set backend to hybrid, or {static}")


def _generations_and_losses(recipe: Recipe) -> list[tuple[str, Evaluation]]:
    """Every evaluation, and the sampling of answers, with its place."""
    found: list[tuple[str, Evaluation]] = [(f"eval.{at}", evaluation) for at, evaluation in enumerate(recipe.eval)]
    return found if recipe.sample is None else [*found, ("sample", recipe.sample)]


def _training(recipe: Recipe, train: Train) -> Iterator[Fault]:
    data = recipe.data
    if train.batch_tokens is not None and train.batch_size is None:
        if not data.packing:
            problem, fix = "without packing, rows differ in length", "set data.packing to true, or count samples by batch_size"
            yield Fault(("train.batch_tokens", "data.packing"), problem, fix)
        elif train.batch_tokens % (at_once := data.max_length * train.micro_batch_size):
            problem = f"{train.batch_tokens:,} is not a multiple of {data.max_length:,} x {train.micro_batch_size}"
            fix = f"set batch_tokens to {nearest_multiples(train.batch_tokens, at_once)}"
            yield Fault(("train.batch_tokens", "data.max_length", "train.micro_batch_size"), problem, fix)
    if train.sink_learning_rate is not None and recipe.hybrid.sink != "learned":
        fix = "set hybrid.sink to learned, or remove sink_learning_rate"
        yield Fault(("train.sink_learning_rate", "hybrid.sink"), "there are no learned sinks", fix)
    if train.sequence_parallel > 1 and recipe.hybrid.sink == "learned":
        problem = "processes that share sequences divide the heads, and learned sinks are not divided"
        yield Fault(("train.sequence_parallel", "hybrid.sink"), problem, "set sequence_parallel to 1, or sink to tokens")
    for setting, measures in (("eval_steps", train.eval_steps is not None), ("keep_best", train.keep_best == EVAL_LOSS)):
        if measures and data.heldout == 0:
            fix = f"set data.heldout above 0, or {setting} to null"
            yield Fault((f"train.{setting}", "data.heldout"), "no samples are held out to measure the loss on", fix)
    if unknown := unknown_scheduler(train.lr_scheduler):
        yield Fault(("train.lr_scheduler",), f"{shown(train.lr_scheduler)}: {unknown}")
    yield from trl_faults(train.trl)


def _lora(recipe: Recipe, lora: Lora) -> Iterator[Fault]:
    if recipe.train is None:
        yield Fault(("lora", "train"), "this recipe trains nothing", "set lora to null")
    elif recipe.train.method != "lora":
        yield Fault(("lora", "train.method"), "method full trains no adapters", "set lora to null, or train.method to lora")
    elif recipe.train.restore_query_key:
        restore, fix = "train.restore_query_key", "set restore_query_key to false, or"
        if lora.layers == "lazy":
            problem = "the full-attention layers have no adapters, so nothing is restored"
            yield Fault((restore, "lora.layers"), problem, f"{fix} lora.layers to all")
        elif not any(target.rpartition(".")[2] in ("q_proj", "k_proj") for target in lora.targets):
            problem = "no query or key projection has an adapter, so nothing is restored"
            yield Fault((restore, "lora.targets"), problem, f"{fix} add q_proj or k_proj to lora.targets")
    faults = list(peft_faults(lora.peft))
    yield from faults
    for name, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))) if not faults else ():
        for module, value in (lora.peft.get(name) or {}).items():
            if type(value) not in kinds or value <= 0:
                kind = "whole number" if kinds == (int,) else "number"
                yield Fault((f"lora.peft.{name}.{module}",), f"{shown(value)}: not a {kind} above 0", f"write a {kind}, such as 16")


def _distillation(recipe: Recipe, train: Train) -> Iterator[Fault]:
    if train.distill.weight == 0:
        return
    if train.distill.teacher == "auto" and recipe.lora is not None:
        peft = recipe.lora.peft
        for name, moves_the_base in (
            ("bias", peft.get("bias", "none") != "none"),
            ("init_lora_weights", peft.get("init_lora_weights", True) not in BASE_STAYS),
            ("modules_to_save", bool(peft.get("modules_to_save"))),
        ):
            if moves_the_base:
                problem = f"with {name}: {shown(peft[name])} the model with its adapters off is not the base"
                yield Fault(("train.distill.teacher", f"lora.peft.{name}"), problem, "set teacher to copy")
    elif train.distill.teacher != "top_k" and _zero_stage(train) == 3:
        problem = "ZeRO-3 does not shard a frozen copy of the base, so each device would hold all of it"
        fix = (
            "set teacher to top_k, whose files are written before training, or train.method to lora, whose base is its own teacher"
        )
        yield Fault(("train.distill.teacher", "train.deepspeed"), problem, fix)


def _zero_stage(train: Train) -> Any:
    """The ZeRO stage of the DeepSpeed configuration; None without a readable one, which is reported elsewhere."""
    if train.deepspeed is None:
        return None
    try:
        return read_deepspeed_file(Path(train.deepspeed))["zero_optimization"]["stage"]
    except (UserError, KeyError, TypeError):
        return None
