"""The hybrid that a run's folder or an export holds, with its tokenizer, ready to answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lt_train.dataset.chat_template import ChatTemplate, own_template
from lt_train.export.checkpoint import exported_tokenizer
from lt_train.export.granite_swa import load_granite_swa
from lt_train.export.manifest import damaged_files, read_manifest
from lt_train.hybrid.configuration import is_hybrid
from lt_train.hybrid.loading import load_hybrid, load_hybrid_checkpoint, read_config
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import FULL, GRANITE_SWA, HybridSpec
from lt_train.inference.engine import Engine, default_budget
from lt_train.inference.loading import bar_if_it_takes_long, device_map, load_base_config
from lt_train.inference.requests import Sampling
from lt_train.inference.tokenizer import load_checked_tokenizer
from lt_train.pipeline.run_folder import check_same_base, recipe_of
from lt_train.pipeline.variants import Variants
from lt_train.recipe.evaluations import CONVERTED, TRAINED
from lt_train.recipe.schema import PER_PROMPT, Model, Prompt
from lt_train.runtime.devices import compute_dtype, computes_in_bf16
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST, RunPaths
from lt_train.runtime.units import GIB
from lt_train.selection.chosen import streaming_count
from lt_train.serving.draft_options import DraftOptions

BUDGET_ON_CPU = 4 * GIB


@dataclass(frozen=True)
class Checkpoint:
    """A hybrid to talk to.

    Attributes:
        source: what it is, in words.
        prompt: of the recipe that made it; None: unknown, of an export.
    """

    folder: Path
    source: str
    model: HybridForCausalLM
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt | None

    @property
    def sampling(self) -> Sampling:
        """How `generate()` samples by the checkpoint's generation_config.json: greedily, unless its do_sample is set."""
        config = self.model.generation_config
        penalty = config.repetition_penalty or 1.0
        if not config.do_sample:
            return Sampling(0.0, 1.0, 1, repetition_penalty=penalty)
        temperature = 1.0 if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        return Sampling(temperature, top_p, 1, top_k=config.top_k or 0, min_p=config.min_p or 0.0, repetition_penalty=penalty)

    def room(self, prompt_tokens: int, longest: int) -> int:
        """Most new tokens of an answer: max_new_tokens of generation_config.json, or what fits the context.

        Args:
            longest: tokens that prompt and answer may have together.
        """
        return min(longest - prompt_tokens, self.model.generation_config.max_new_tokens or longest)

    def conversation(self, turns: Sequence[Mapping[str, str]]) -> str:
        """A conversation up to the answer, by the chat template. Of a run it has no system turn that the run was trained without.

        Raises:
            TemplateError, ValueError, TypeError, UserError: the chat template refuses the turns.
        """
        if self._template_of_run is not None:
            return self._template_of_run.render(turns, add_generation_prompt=True)
        return str(self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))

    @cached_property
    def _template_of_run(self) -> ChatTemplate | None:
        """Kept: where its default system turn ends is found once, and not for each answer."""
        return None if self.prompt is None else ChatTemplate(self.tokenizer, self.prompt)

    def prompt_ids(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            ValueError: it is no text, or holds a token that the model does not embed.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds bytes that are no UTF-8, or half of a surrogate pair, which is no text") from error
        return self.checked(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Raises ValueError for ids that the model does not embed; its tokenizer may have some."""
        vocab_size = self.model.config.vocab_size
        unknown = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if unknown is not None:
            raise ValueError(f"{unknown}: no token id; there are 0 to {vocab_size - 1:,}")
        return tuple(ids)

    @property
    def streaming(self) -> str:
        """The layers or heads that stream, in words."""
        return f"{streaming_count(self.model.spec, self.model.config.kv_heads)} stream"

    def engine(self, kv_budget: int | None, max_slots: int = 64, draft: DraftOptions | None = None) -> Engine:
        """
        Args:
            kv_budget: bytes; None: most of what is free, and on a CPU, where other programs share it, BUDGET_ON_CPU at most.

        Raises:
            UserError: no such draft (`Draft.of`).
        """
        drafting = None if draft is None else draft.draft(self.model.spec)
        if kv_budget is None:
            kv_budget = default_budget(self.model, max_slots, drafting)
            kv_budget = min(kv_budget, BUDGET_ON_CPU) if self.model.device.type == "cpu" else kv_budget
        return Engine(self.model, self.tokenizer, kv_budget=kv_budget, max_slots=max_slots, draft=drafting)


def load_checkpoint(folder: Path) -> Checkpoint:
    """
    Args:
        folder: of an export, or of a run: its trained hybrid, or the converted one where its recipe does not train.

    Raises:
        UserError: neither, a run that has not come so far or whose base is another model now, or an export of which files are
            missing.
    """
    if (folder / EXPORT_MANIFEST).is_file():
        return _export(folder)
    paths = RunPaths(folder)
    if paths.recipe.is_file():
        return _run(paths)
    what = "neither a run nor an export" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: {what}. Fix: name a run's folder, runs/<name>, or an export, runs/<name>/export")


def _export(folder: Path) -> Checkpoint:
    damaged = damaged_files(folder, read_manifest(folder), by_size=True)
    if damaged:
        raise UserError(
            f"{folder}: {', '.join(damaged)}: missing, or of another size than exported. Fix: export or download it again"
        )
    source, config = Model(base=str(folder)), read_config(folder)
    tokenizer = load_checked_tokenizer(source, config)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) and computes_in_bf16() else torch.float32
    with bar_if_it_takes_long(source):
        if is_hybrid(config):
            model = load_hybrid_checkpoint(folder, dtype=dtype, device_map=device_map())
        elif config.model_type == GRANITE_SWA:
            model = load_granite_swa(folder, config, dtype=dtype, device_map=device_map())
        else:
            spec, base = _without_window(config)
            model = load_hybrid(folder, spec, dtype=dtype, config=base, device_map=device_map())
    return Checkpoint(folder, "export", model, tokenizer, None)


def _without_window(config: PreTrainedConfig) -> tuple[HybridSpec, PreTrainedConfig]:
    """A stock class's config with a window in some layers, as the spec of these and the config of the base."""
    spec = HybridSpec.from_layer_types(config.layer_types, 0, config.sliding_window)
    values = {**config.to_dict(), "layer_types": [FULL] * spec.num_layers, "sliding_window": None}
    return spec, type(config)(**values)


def _run(paths: RunPaths) -> Checkpoint:
    recipe = recipe_of(paths)
    if recipe.hybrid.select == PER_PROMPT:
        raise UserError(
            f"{paths.root}: hybrid.select: per_prompt: prompts choose the layers that stream in evaluations alone. "
            "Fix: measure with lt-train eval, or set hybrid.select to static"
        )
    variant = CONVERTED if recipe.train is None else TRAINED
    left = paths.layers if variant == CONVERTED else paths.trained_manifest
    if not left.is_file():
        stage = "convert" if variant == CONVERTED else "train"
        raise UserError(f"{paths.root}: there is no {variant} hybrid in this run yet. Fix: lt-train {stage} RECIPE")
    check_same_base(paths, recipe)
    config = load_base_config(recipe.model)
    tokenizer = load_checked_tokenizer(recipe.model, config, recipe.prompt)
    tokenizer = exported_tokenizer(tokenizer, own_template(recipe.prompt))
    model = Variants(recipe, paths, config).load(variant, compute_dtype(recipe.model.dtype))
    return Checkpoint(paths.root, f"{variant} hybrid", model, tokenizer, recipe.prompt)
