"""The Python API, `import lt_train`: what the commands do, as five functions. Each loads torch only when it is called.

A mistake of the caller raises `lt_train.runtime.errors.UserError`, with the same text as on the command line.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lt_train.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lt_train.dataset.examples import Example
    from lt_train.hybrid.modeling import HybridForCausalLM
    from lt_train.hybrid.spec import HybridSpec
    from lt_train.recipe.part import Part
    from lt_train.recipe.schema import Model, Recipe, Strategy
    from lt_train.report.contents import RunResults
    from lt_train.selection.profile import LayerProfile

    Settings = TypeVar("Settings", bound=Part)

UpTo = Literal["profile", "convert", "teacher", "train", "eval", "export"]


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, as `lt-train validate` does. Nothing is loaded.

    Args:
        path_or_name: a YAML file, or the name of a recipe of `lt-train recipes`.
        overrides: as after `--set`: "hybrid.w_recent=252".

    Returns:
        The recipe with all defaults; every setting is an attribute: `recipe.hybrid.w_recent`.

    Raises:
        UserError: one error that lists every fault of the file and of the overrides.
    """
    from lt_train.recipe.loading import load_recipe as load

    return load(Path(path_or_name), overrides)


def run(recipe: Recipe | str | Path, runs: str | Path = "runs", up_to: UpTo = "export") -> Path:
    """Do all that a recipe sets, as `lt-train run` does; a run that was stopped resumes.

    Args:
        recipe: what `load_recipe` returned, or what it takes.
        runs: the folder of run folders.
        up_to: the last stage, by the name of its command; what it needs is done before it.

    Returns:
        The run's folder, `runs/<name>`, which `read_results` reads; the checkpoint is its subfolder `export`.

    Raises:
        UserError: the recipe, the data or the base cannot be used, or the folder is another run's.
    """
    from lt_train.recipe.schema import Recipe
    from lt_train.runtime.processes import this_process
    from lt_train.runtime.upstream import quiet_upstream

    checked, process = recipe if isinstance(recipe, Recipe) else load_recipe(recipe), this_process()
    if process.count > 1:
        raise UserError(
            f"lt_train.run: runs in one process, not in {process.count}. Fix: start the command lt-train train with deepspeed or "
            "torchrun, and call this afterwards"
        )
    quiet_upstream()
    from lt_train.pipeline.run import COMMANDS, work

    if up_to not in COMMANDS:
        raise UserError(f"up_to: {up_to!r}: no stage. Fix: use one of {', '.join(COMMANDS)}")
    with _as_user_error():
        return work(checked, "run" if up_to == "export" else up_to, Path(runs), process)


def score_layers(
    model: PreTrainedModel | str | Path,
    texts: Sequence[str | Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strategy: Strategy | Sequence[Strategy] = "reach",
    w_sink: int = 4,
    w_recent: int = 1020,
    w_last: int = 64,
    long_reach_fraction: float = 0.1,
    family: Literal["auto"] | None = None,
) -> LayerProfile:
    """Score every layer of a full-attention model: how much does the model lose when this layer streams?

    Args:
        model: a causal language model as transformers loads it, which stays as it is, or its folder or hub id.
        texts: documents, or their token ids. Every token after the first counts as one of an answer. Documents of fewer than
            `w_sink + w_recent + 2` tokens distinguish no layers and are skipped.
        tokenizer: of the model; not needed where the model is a path, or where `texts` are token ids.
        strategy: one or several of gates, reach, nll, kl and lazy_ratio, which docs/recipes.md explains, as it does the sizes.
        family: as in `convert`.

    Returns:
        The layer profile: `profile.scores["reach"][sample][layer]`. `profile.choose("reach", 14)` gives the 14 layers that lose
        least by streaming, as `convert` takes them.

    Raises:
        UserError: no hybrid can be made of the model, a setting is out of range, more than half of the texts fit inside the window,
            or a score is not finite.
    """
    import torch

    from lt_train.hybrid.base_spec import base_spec
    from lt_train.recipe.schema import Hybrid
    from lt_train.selection.profile import SCORED
    from lt_train.selection.scoring import profile_layers

    strategies = [strategy] if isinstance(strategy, str) else list(strategy)
    unknown = [name for name in strategies if name not in SCORED]
    if unknown or not strategies:
        raise UserError(f"strategy: {', '.join(unknown) or 'none'}: scores no layers. Fix: use {', '.join(SCORED)}")
    calibration = {"w_last": w_last, "long_reach_fraction": long_reach_fraction}
    hybrid = _checked(Hybrid, {"lazy_layer_ratio": 0.5, "w_sink": w_sink, "w_recent": w_recent, "calibration": calibration})
    if isinstance(model, str | Path) and tokenizer is None:
        tokenizer = _tokenizer(model)
    examples = _examples(texts, tokenizer)
    if not examples:
        raise UserError(f"texts: none, so no layer can be scored. Fix: pass documents of at least {w_sink + w_recent + 2} tokens")
    with _as_user_error(), torch.inference_mode(False):  # gates needs gradients
        scored = _hybrid(model, lambda config: base_spec(config.to_dict(), hybrid.w_sink, hybrid.w_recent), family)
        _check_ids(examples, scored.config.vocab_size)
        return profile_layers(scored, examples, hybrid, strategies)


def convert(
    model: PreTrainedModel | str | Path,
    *,
    layers: Sequence[int] | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
    select: Literal["static", "per_prompt"] = "static",
    lazy_layer_ratio: float | None = None,
    w_last: int = 64,
    w_sink: int = 4,
    w_recent: int = 1020,
    learned_sinks: bool = False,
    family: Literal["auto"] | None = None,
) -> HybridForCausalLM:
    """The hybrid of a full-attention model: its own weights, and the named layers or KV heads stream. Untrained.

    With `select="per_prompt"` each prompt chooses its layers instead (LightTransfer-Test): `generate()` reads it with full
    attention in every layer, and its least lazy layers stay full in the answer.

    Args:
        model: a causal language model of a family in docs/families.md as transformers loads it, which stays as it is; no weights
            are copied, so training either model changes both. Or a folder or hub id, whose weights are loaded on the
            accelerator, if there is one.
        layers: the layers that stream, from 0. Pass either these or `heads`.
        heads: by layer, the key/value heads that stream, from 0, with their query heads: `{2: [0, 3], 5: [1]}`.
        select: "per_prompt" instead of both.
        lazy_layer_ratio: with "per_prompt", the fraction of layers that stream in an answer.
        w_last: with "per_prompt", the last queries of a prompt over which the lazy ratio is averaged.
        w_sink: the first tokens of a sequence that a streaming layer sees.
        w_recent: the most recent tokens that it sees, the query itself included.
        learned_sinks: a logit for each query head in place of sink tokens, with `w_sink=0`. They start at 0, and want training.
        family: "auto" for a model of another family that transformers knows or that is registered with it: a small model of its
            config proves first that it streams (see docs/families.md).

    Returns:
        A transformers model: `generate`, `save_pretrained` and training work as for any other. While
        `with hybrid.full_attention():` runs, it is the base.

    Raises:
        UserError: no hybrid can be made of the model, it does not compute what its config and weights say, a layer, a head, a
            ratio or a size is out of range, or settings of prompts that choose are combined with those of layers or heads.
    """
    from lt_train.hybrid.base_spec import base_spec
    from lt_train.hybrid.kv_size import kv_heads
    from lt_train.hybrid.spec import HybridSpec
    from lt_train.selection.choose import explicit_layers

    if select == "per_prompt":
        if layers is not None or heads is not None or learned_sinks:
            raise UserError(
                "select: per_prompt: each prompt chooses entire layers, and sinks are tokens. Fix: remove layers, heads and "
                "learned_sinks, or select"
            )
        return _choosing_per_prompt(model, lazy_layer_ratio, w_last, w_sink, w_recent, family)
    if select != "static" or lazy_layer_ratio is not None:
        raise UserError(
            f"select: {select!r}, lazy_layer_ratio: {lazy_layer_ratio}: without prompts that choose, layers or heads set what "
            "streams. Fix: remove both, or set select to per_prompt"
        )
    if (layers is None) == (heads is None):
        raise UserError("layers, heads: both or neither. Fix: pass the layers that stream, or by layer the KV heads that do")

    w_sink, w_recent = _whole_numbers("w_sink, w_recent", (w_sink, w_recent))
    named_layers = None if layers is None else _whole_numbers("layers", layers)
    named_heads = {} if heads is None else _named_heads(heads)

    def spec(config: PreTrainedConfig) -> HybridSpec:
        count, base = config.num_hidden_layers, base_spec(config.to_dict())
        if named_layers is not None:
            lazy = explicit_layers(named_layers, count, base.sliding_layers)
            return HybridSpec(count, lazy, w_sink, w_recent, learned_sinks).on(base)
        if outside := sorted(named_heads.keys() - range(count)):
            raise UserError(f"heads: layers {outside}: not in the model. Fix: name layers from 0 to {count - 1}")
        heads_L = [named_heads.get(layer, ()) for layer in range(count)]
        found = HybridSpec.from_streaming_heads(heads_L, kv_heads(config.to_dict()), w_sink, w_recent).on(base)
        if not found.streams or len(found.lazy_layers) == len(base.full_in_base):
            raise UserError("heads: none or all of them would stream. Fix: name some KV heads, and not all")
        return replace(found, learned_sinks=learned_sinks)

    with _as_user_error():
        return _hybrid(model, spec, family)


def _whole_numbers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """As plain ints, also those of an array or a tensor, whose elements no set or range of ints finds."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise UserError(f"{name}: {reprlib.repr(values)}: not whole numbers. Fix: write each as digits, as in [0, 3]") from error


def _named_heads(heads: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    if not isinstance(heads, Mapping):
        raise UserError(f"heads: {heads!r}: no mapping. Fix: pass by layer the KV heads that stream, such as {{2: [0, 3]}}")
    layers = _whole_numbers("heads: layers", heads)
    return {
        layer: _whole_numbers(f"heads of layer {layer}", heads_G) for layer, heads_G in zip(layers, heads.values(), strict=True)
    }


def _choosing_per_prompt(
    model: PreTrainedModel | str | Path,
    lazy_layer_ratio: float | None,
    w_last: int,
    w_sink: int,
    w_recent: int,
    family: Literal["auto"] | None,
) -> HybridForCausalLM:
    from lt_train.hybrid.base_spec import base_spec
    from lt_train.inference.per_prompt import PerPrompt
    from lt_train.inference.per_prompt_cache import choose_per_prompt
    from lt_train.recipe.schema import Hybrid
    from lt_train.selection.choose import number_by_ratio

    if lazy_layer_ratio is None:
        raise UserError("lazy_layer_ratio: missing: the fraction of layers that stream. Fix: pass it (0.5 in the paper)")
    sizes = {"w_sink": w_sink, "w_recent": w_recent, "calibration": {"w_last": w_last}}
    _checked(Hybrid, {"lazy_layer_ratio": lazy_layer_ratio, **sizes})
    with _as_user_error():
        made = _hybrid(model, lambda config: base_spec(config.to_dict(), w_sink, w_recent), family)
        layers = made.config.num_hidden_layers
        keep = layers - number_by_ratio(lazy_layer_ratio, layers, "layer")
        choose_per_prompt(made, PerPrompt(keep, w_last))
    return made


def read_results(run_folder: str | Path) -> RunResults:
    """What a run has measured so far: scores, layer profile, streaming layers and curves, as plain data.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    from lt_train.report.contents import read_run_results

    return read_run_results(Path(run_folder))


def _hybrid(
    model: PreTrainedModel | str | Path, spec: Callable[[PreTrainedConfig], HybridSpec], family: Literal["auto"] | None
) -> HybridForCausalLM:
    """`spec`: from the model's config."""
    from transformers import PreTrainedModel

    from lt_train.hybrid.loading import hybrid_of, is_declared, prove_auto_family, refuse_undeclared
    from lt_train.inference.loading import load_base_config, load_for_inference
    from lt_train.inference.same_logits import check_same_logits
    from lt_train.runtime.devices import compute_dtype
    from lt_train.runtime.upstream import quiet_upstream

    if isinstance(model, PreTrainedModel):
        if family is None:
            refuse_undeclared(model.config)
        elif not is_declared(model.config):
            prove_auto_family(model.config)
        hybrid = hybrid_of(model, spec(model.config.get_text_config()))
        check_same_logits(model, hybrid)
        return hybrid
    if not isinstance(model, str | Path):
        raise UserError(
            f"model: {type(model).__name__}: neither a transformers model nor a path. Fix: pass what from_pretrained returns; of a "
            "model with adapters, what merge_and_unload() returns"
        )
    quiet_upstream()
    base = _base(model, family)
    return load_for_inference(base, spec(load_base_config(base)), compute_dtype(base.dtype))


def _base(model: str | Path, family: Literal["auto"] | None = None) -> Model:
    from lt_train.recipe.schema import Model

    return _checked(Model, {"base": str(model), "family": family})


def _tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    from lt_train.inference.tokenizer import load_tokenizer

    return load_tokenizer(_base(model))


def _examples(texts: Sequence[str | Sequence[int]], tokenizer: PreTrainedTokenizerBase | None) -> list[Example]:
    """Each text as an answer whose prompt is its first token, which nothing predicts."""
    from lt_train.dataset.examples import Example

    if isinstance(texts, str):
        raise UserError("texts: a single text. Fix: pass a list of texts")
    examples = []
    for number, text in enumerate(texts):
        ids = _token_ids(f"texts[{number}]", text, tokenizer)
        examples.append(Example(f"texts[{number}]", f"texts[{number}]", ids[:1], ids[1:]))
    return examples


def _token_ids(name: str, text: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    if not isinstance(text, str):
        return _whole_numbers(name, text)
    if tokenizer is None:
        raise UserError("tokenizer: missing, and texts are to be tokenized. Fix: pass the model's tokenizer, or token ids")
    return tuple(tokenizer(text)["input_ids"])


def _check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    for example in examples:
        unknown = next((token for token in example.input_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UserError(
                f"{example.id}: token {unknown}: the model embeds {vocab_size:,} tokens. Fix: use the tokenizer of this model"
            )


def _checked(part: type[Settings], values: dict[str, Any]) -> Settings:
    """A part of a recipe. Raises UserError with every fault of the values."""
    from lt_train.recipe.messages import validate_all

    settings, faults, _ = validate_all(part, values)
    if faults:
        raise UserError("\n".join(map(str, faults)))
    return settings


@contextmanager
def _as_user_error() -> Iterator[None]:
    """A request that a hybrid cannot compute is the caller's mistake, too."""
    from lt_train.hybrid.spec import HybridError

    try:
        yield
    except HybridError as error:
        raise UserError(str(error)) from error
