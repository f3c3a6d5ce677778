"""What settings of a recipe must agree on, and which names and files must exist. Each conflict says what to change."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lt_train.benchmarks import BENCHMARKS, answer_tokens
from lt_train.recipe.batch_size import nearest_multiples
from lt_train.recipe.deepspeed_file import contradictions, read_deepspeed_file
from lt_train.recipe.distill_checks import distill_faults, parameter_faults, restore_faults
from lt_train.recipe.messages import did_you_mean
from lt_train.recipe.schema import EVAL_LOSS, HELDOUT, Data, Eval, HeldoutKL, HeldoutLoss, Recall, Recipe, Train
from lt_train.recipe.upstream_names import (
    PEFT_LORA_CONFIG_NAMES,
    PEFT_SET_BY_RECIPE,
    SCHEDULER_NAMES,
    TRL_SET_BY_RECIPE,
    TRL_SFT_CONFIG_NAMES,
)
from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import resolve_data, resolve_model


@dataclass(frozen=True)
class Conflict:
    """Settings (dotted paths) that do not go together, with the way out."""

    settings: tuple[str, ...]
    message: str


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    yield from chain(
        _sources(recipe),
        _files(recipe),
        _attention(recipe),
        _layers(recipe),
        _data(recipe),
        _training(recipe),
        _lora(recipe),
        _prompt(recipe),
        _evaluations(recipe),
        _probes(recipe),
    )


def _sources(recipe: Recipe) -> Iterator[Conflict]:
    local_names = [("data.source", recipe.data.source, resolve_data)]
    local_names += [(f"{here}.path", entry.path, resolve_data) for here, entry in _generated(recipe) if entry.path is not None]
    for setting, name, resolve in [("model.base", recipe.model.base, resolve_model), *local_names]:
        try:
            resolve(name)
        except UserError as error:
            yield Conflict((setting,), str(error))
    if recipe.model.revision is not None and Path(recipe.model.base).is_dir():
        yield Conflict(
            ("model.revision", "model.base"),
            f"{recipe.model.base} is a local folder and has no revisions; set model.revision to null",
        )


def _files(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.prompt.chat_template is not None:
        yield from _missing_file("prompt.chat_template", recipe.prompt.chat_template)
    if recipe.train is not None and recipe.train.deepspeed is not None:
        path = Path(recipe.train.deepspeed)
        try:
            found = list(contradictions(read_deepspeed_file(path), recipe))
        except UserError as error:
            yield Conflict(("train.deepspeed",), str(error))
        else:
            yield from (Conflict(("train.deepspeed",), f"{path}: {contradiction}") for contradiction in found)


def _missing_file(setting: str, path: str) -> Iterator[Conflict]:
    if not Path(path).is_file():
        yield Conflict((setting,), f"there is no file {path} (looked at {Path(path).absolute()})")


def _attention(recipe: Recipe) -> Iterator[Conflict]:
    """What is wrong on every device; the rest is known on the device alone (base_model.py, `attention_choice`)."""
    if recipe.model.attention == "flash" and recipe.model.dtype == "fp32":
        yield Conflict(
            ("model.attention", "model.dtype"),
            "flash attention computes in bf16 only; set model.dtype to bf16, or model.attention to auto",
        )


def _layers(recipe: Recipe) -> Iterator[Conflict]:
    hybrid = recipe.hybrid
    ratio, strategy, layers = "hybrid.lazy_layer_ratio", "hybrid.strategy", "hybrid.layers"
    if hybrid.layers is None and hybrid.lazy_layer_ratio is None:
        yield Conflict((ratio, layers), "say which layers stream: give a ratio (0.5 is the paper's) or a list of layers")
    if hybrid.layers is not None and hybrid.lazy_layer_ratio is not None:
        yield Conflict(
            (layers, ratio),
            f"the list says which layers stream, a ratio has nothing to choose; set {ratio} to null, or {layers}",
        )
    if hybrid.layers is not None and hybrid.strategy is not None:
        yield Conflict(
            (layers, strategy),
            f"the list says which layers stream, a strategy has nothing to choose; set {strategy} to null, or {layers}",
        )
    if hybrid.layers is not None and len(set(hybrid.layers)) < len(hybrid.layers):
        yield Conflict((layers,), f"layers are named twice: {_repeated(hybrid.layers)}")
    if hybrid.strategy in hybrid.compare:
        yield Conflict(
            ("hybrid.compare", strategy),
            f"{hybrid.strategy} is the chosen strategy; compare names the others: take it out",
        )
    if len(set(hybrid.compare)) < len(hybrid.compare):
        yield Conflict(("hybrid.compare",), f"strategies are named twice: {_repeated(hybrid.compare)}")


def _data(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    local = Path(data.source).expanduser()
    if data.subset is not None and local.exists():
        yield Conflict(("data.subset", "data.source"), f"{data.source} is local and has no subsets; take data.subset out")
    if data.split != "train" and local.is_file():
        yield Conflict(("data.split", "data.source"), f"{data.source} is one file and has no splits; take data.split out")
    if data.limit is not None and data.heldout >= data.limit:
        yield Conflict(
            ("data.heldout", "data.limit"),
            f"of {data.limit} rows {data.heldout} are set aside, so none is left; raise limit or lower heldout",
        )


def _training(recipe: Recipe) -> Iterator[Conflict]:
    train = recipe.train
    if train is None:
        return
    if train.epochs is None and train.max_steps is None:
        yield Conflict(("train.epochs", "train.max_steps"), "say how long to train: give one of them")
    if train.epochs is not None and train.max_steps is not None:
        yield Conflict(("train.epochs", "train.max_steps"), "both say how long to train; keep one and set the other to null")
    yield from _batch(train, recipe.data)
    yield from _sequence_parallel(train)
    if train.eval_steps is not None and recipe.data.heldout == 0:
        yield Conflict(
            ("train.eval_steps", "data.heldout"),
            "nothing is set aside to evaluate on; set data.heldout, or eval_steps to null",
        )
    if train.lr_scheduler not in SCHEDULER_NAMES:
        near = did_you_mean(train.lr_scheduler, SCHEDULER_NAMES)
        known = f"; there are {', '.join(sorted(SCHEDULER_NAMES))}"
        yield Conflict(
            ("train.lr_scheduler",),
            f"{train.lr_scheduler!r} is no scheduler of transformers{near or known}",
        )
    for settings, message in chain(distill_faults(recipe, train), parameter_faults(recipe, train), restore_faults(recipe, train)):
        yield Conflict(settings, message)
    yield from _upstream_names("train.trl", train.trl, TRL_SFT_CONFIG_NAMES, TRL_SET_BY_RECIPE, "TRL's SFTConfig")


def _batch(train: Train, data: Data) -> Iterator[Conflict]:
    size, tokens, micro = "train.batch_size", "train.batch_tokens", "train.micro_batch_size"
    if train.batch_size is None and train.batch_tokens is None:
        yield Conflict((size, tokens), "say how much an optimizer step takes: give one of them")
    elif train.batch_size is not None and train.batch_tokens is not None:
        yield Conflict((size, tokens), "both say how much an optimizer step takes; keep one and set the other to null")
    elif train.batch_size is not None and train.batch_size % train.micro_batch_size:
        near = nearest_multiples(train.batch_size, train.micro_batch_size)
        yield Conflict(
            (size, micro), f"{train.batch_size} is no multiple of {train.micro_batch_size}; the nearest that are: {near}"
        )
    elif train.batch_tokens is not None and not data.packing:
        yield Conflict(
            (tokens, "data.packing"),
            "samples differ in length; set data.packing to true, or count samples by train.batch_size",
        )
    elif train.batch_tokens is not None and train.batch_tokens % (at_once := data.max_length * train.micro_batch_size):
        near, product = nearest_multiples(train.batch_tokens, at_once), f"{data.max_length:,} x {train.micro_batch_size}"
        yield Conflict(
            (tokens, "data.max_length", micro),
            f"{train.batch_tokens:,} is no multiple of {product}; the nearest that are: {near}",
        )


def _sequence_parallel(train: Train) -> Iterator[Conflict]:
    degree = "train.sequence_parallel"
    if train.sequence_parallel == 1:
        return
    if train.deepspeed is None:
        yield Conflict(
            (degree, "train.deepspeed"), "DeepSpeed shares the sequences; name its configuration, such as launch/zero3.json"
        )
    if train.micro_batch_size > 1:
        yield Conflict(
            (degree, "train.micro_batch_size"),
            f"processes share one row at a time; set micro_batch_size to 1 instead of {train.micro_batch_size}",
        )
    if train.distill.weight > 0:
        yield Conflict(
            (degree, "train.distill.weight"),
            "a teacher is asked about whole sequences, not about slices; set sequence_parallel to 1, or weight to 0",
        )
    if "pad_to_multiple_of" in train.trl:
        yield Conflict(
            (degree, "train.trl.pad_to_multiple_of"), "rows are filled up so that slices are of equal length; take it out"
        )


def _lora(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.lora is None:
        return
    if recipe.train is None:
        yield Conflict(("lora", "train"), "there is no training; take the lora part out (--set lora=null)")
    elif recipe.train.method != "lora":
        yield Conflict(
            ("lora", "train.method"),
            "method full trains the weights themselves; take the lora part out, or set train.method to lora",
        )
    yield from _upstream_names("lora.peft", recipe.lora.peft, PEFT_LORA_CONFIG_NAMES, PEFT_SET_BY_RECIPE, "PEFT's LoraConfig")


def _upstream_names(
    setting: str, given: dict[str, Any], known: frozenset[str], set_by_recipe: dict[str, str], owner: str
) -> Iterator[Conflict]:
    for name in given:
        if name in set_by_recipe:
            yield Conflict((f"{setting}.{name}",), f"not to be set here; {set_by_recipe[name]}")
        elif name not in known:
            yield Conflict((f"{setting}.{name}",), f"no argument of {owner}{did_you_mean(name, known - set_by_recipe.keys())}")


def _prompt(recipe: Recipe) -> Iterator[Conflict]:
    if "{question}" not in recipe.prompt.user:
        yield Conflict(("prompt.user",), f"{recipe.prompt.user!r} has no place for the question; write {{question}} where it goes")


def _evaluations(recipe: Recipe) -> Iterator[Conflict]:
    names = [entry.name for entry in recipe.eval]
    for at, entry in enumerate(recipe.eval):
        here = f"eval.{at}"
        first = names.index(entry.name)
        if first < at:
            yield Conflict(
                (f"{here}.name", f"eval.{first}.name"),
                f"two evaluations are named {entry.name}; give one of them another name",
            )
        yield from _variants(recipe, here, entry)
        if entry.benchmark in HELDOUT and recipe.data.heldout == 0:
            yield Conflict(
                (f"{here}.benchmark", "data.heldout"), f"{entry.benchmark} needs held-out samples; set data.heldout above 0"
            )
        if entry.benchmark == "heldout_kl" and "base" in (entry.of or []):
            yield Conflict((f"{here}.of",), "heldout_kl compares with the base, whose own is 0; take base out")
    for here, entry in _generated(recipe):
        yield from _benchmark(here, entry)
        yield from _backend(here, entry)
        yield from _sampling(here, entry)
    if recipe.sample is not None:
        yield from _variants(recipe, "sample", recipe.sample)
        if recipe.sample.max_tokens is not None and recipe.sample.max_tokens < recipe.sample.min_tokens:
            yield Conflict(("sample.max_tokens", "sample.min_tokens"), "no answer is that short and that long; swap them")


def _sampling(here: str, entry: Eval) -> Iterator[Conflict]:
    if entry.temperature > 0:
        return
    if entry.samples > 1:
        yield Conflict(
            (f"{here}.samples", f"{here}.temperature"),
            f"greedy answers are all the same; set samples to 1 instead of {entry.samples}, or temperature above 0",
        )
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        if getattr(entry, name) != off:
            yield Conflict(
                (f"{here}.{name}", f"{here}.temperature"),
                f"greedy answers know no {name}; take it out, or set temperature above 0",
            )


def _probes(recipe: Recipe) -> Iterator[Conflict]:
    train = recipe.train
    if train is None:
        return
    probes, best = "train.probes", "train.keep_best"
    entries = train.probes.evals if train.probes else []
    names = [entry.name for entry in entries]
    for at, entry in enumerate(entries):
        here, first = f"{probes}.evals.{at}", names.index(entry.name)
        if first < at:
            yield Conflict((f"{here}.name", f"{probes}.evals.{first}.name"), f"two probes are named {entry.name}; rename one")
        if entry.name == EVAL_LOSS:
            yield Conflict((f"{here}.name",), f"{EVAL_LOSS} is the held-out loss; give the probe another name")
        if entry.of is not None:
            yield Conflict((f"{here}.of",), "a probe looks at the checkpoint of a training; take it out")
        if entry.backend != "hybrid":
            yield Conflict((f"{here}.backend",), "no server has the checkpoint of a training; take it out")
    if train.probes is not None and not re.fullmatch(r"same|cpu|cuda:\d+(,\d+)*", train.probes.device):
        yield Conflict((f"{probes}.device",), f"{train.probes.device!r} is none of same, cpu, cuda:7, cuda:6,7")
    if train.keep_best == EVAL_LOSS:
        if recipe.data.heldout == 0:
            yield Conflict((best, "data.heldout"), "nothing is set aside to measure the loss on; set data.heldout")
    elif train.keep_best is not None and train.keep_best not in names:
        near = did_you_mean(train.keep_best, [EVAL_LOSS, *names])
        known = f"; there are {', '.join([EVAL_LOSS, *names])}"
        yield Conflict((best, f"{probes}.evals"), f"nothing is measured as {train.keep_best!r}{near or known}")
    if train.publish == "best" and train.keep_best is None:
        yield Conflict(("train.publish", best), f"best by what? Set train.keep_best to {EVAL_LOSS} or a probe's name")


def _backend(here: str, entry: Eval) -> Iterator[Conflict]:
    if entry.backend == "openai" and not entry.servers:
        yield Conflict((f"{here}.servers", f"{here}.backend"), "name the servers to ask, such as [http://localhost:8000]")
    if entry.backend == "openai" and len(entry.of or []) > 1:
        yield Conflict((f"{here}.of", f"{here}.backend"), "servers serve one model; evaluate one variant in an entry")
    if entry.backend == "openai" and entry.thinking_budget is not None:
        yield Conflict((f"{here}.thinking_budget", f"{here}.backend"), "a server cannot close a thought; use backend: hybrid")
    if entry.backend == "hybrid" and entry.servers:
        yield Conflict((f"{here}.servers", f"{here}.backend"), "the built-in engine asks no servers; set backend to openai")


def _benchmark(here: str, entry: Eval) -> Iterator[Conflict]:
    """What a benchmark leaves to the recipe, and what it does not know."""
    benchmark = BENCHMARKS[entry.benchmark]
    if not benchmark.generated and benchmark.source is None and entry.path is None:
        yield Conflict((f"{here}.path",), f"{benchmark.name} is a file of your own: name it")
    if entry.recall is not None:
        if not benchmark.generated:
            yield Conflict((f"{here}.recall",), f"{benchmark.name} is read, not made; take recall out")
        unused = sorted(_changed(entry.recall) - set(benchmark.recall_settings))
        if benchmark.generated and unused:
            yield Conflict((f"{here}.recall.{unused[0]}",), f"{benchmark.name} has no such setting; take it out")
    if entry.max_prompt_tokens is not None and not benchmark.truncate_middle:
        yield Conflict((f"{here}.max_prompt_tokens",), f"problems of {benchmark.name} are never cut; take it out")
    if entry.instruction and benchmark.prompt_style != "as_recipe":
        yield Conflict((f"{here}.instruction",), f"{benchmark.name} has a prompt of its own; take it out")
    if entry.max_new_tokens is None and answer_tokens(benchmark) is None:
        yield Conflict((f"{here}.max_new_tokens",), f"missing; {benchmark.name} does not say how long an answer may be")
    if entry.thinking_budget is not None and entry.max_new_tokens is not None and entry.thinking_budget >= entry.max_new_tokens:
        yield Conflict(
            (f"{here}.thinking_budget", f"{here}.max_new_tokens"),
            "no room for an answer after the thought; raise max_new_tokens above thinking_budget",
        )


def _changed(recall: Recall) -> set[str]:
    """The settings that are not at their defaults: in a resolved recipe all are given."""
    return {name for name, field in type(recall).model_fields.items() if getattr(recall, name) != field.default}


def _variants(recipe: Recipe, here: str, entry: Eval | HeldoutLoss | HeldoutKL) -> Iterator[Conflict]:
    variants = entry.of or []
    if "trained" in variants and recipe.train is None:
        yield Conflict(
            (f"{here}.of", "train"),
            "nothing is trained in this recipe; evaluate converted instead of trained, or add a train part",
        )
    if len(set(variants)) < len(variants):
        yield Conflict((f"{here}.of",), f"named twice: {_repeated(variants)}")


def _generated(recipe: Recipe) -> list[tuple[str, Eval]]:
    """The entries that generate answers, each with its dotted path."""
    found = [(f"eval.{at}", entry) for at, entry in enumerate(recipe.eval) if entry.benchmark not in HELDOUT]
    if recipe.train is not None and recipe.train.probes is not None:
        found += [(f"train.probes.evals.{at}", entry) for at, entry in enumerate(recipe.train.probes.evals)]
    return found if recipe.sample is None else [*found, ("sample", recipe.sample)]


def _repeated(items: list[Any]) -> str:
    return ", ".join(sorted({str(item) for item in items if items.count(item) > 1}))
