"""The models that a run compares: the base, the hybrid before training by each way to choose its layers, the trained hybrid."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lt_train.hybrid.base_spec import base_spec
from lt_train.hybrid.kv_size import kv_heads
from lt_train.hybrid.loading import build_hybrid, hybrid_config
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.inference.loading import load_for_inference
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.trained_weights import check_restorable, load_trained
from lt_train.pipeline.keys import as_trained, compared_when_trained
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.part import all_parts
from lt_train.recipe.schema import (
    HOW_MANY,
    NAMED,
    PER_PROMPT,
    Eval,
    HeldoutKL,
    HeldoutLoss,
    Recipe,
    converted_by,
    identity_of,
    settings_that_may_change,
)
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.fingerprints import file_hash, hash_of
from lt_train.runtime.run_paths import MANIFEST, RunPaths
from lt_train.selection.choose import choose_layers, choose_spec, number_that_stream
from lt_train.selection.chosen import Chosen, nearest_number_of_layers, read_chosen, recorded, spec_of
from lt_train.selection.profile import LayerProfile
from lt_train.training.trainable import check_names

IDENTIFYING = ("keep_best", "final_weights", "restore_query_key", "deepspeed", "micro_batch_size", "gradient_checkpointing")
"""Settings of a training that may change afterwards, and that a fingerprint holds all the same (see `as_trained`); so it does
`hybrid.compare`."""


@dataclass(frozen=True)
class Variants:
    """What streams in each variant of a run, kept in hybrid/layers.json, and how to load each."""

    recipe: Recipe
    paths: RunPaths
    base_config: PreTrainedConfig

    def check_fits(self) -> None:
        """
        Raises:
            UserError: the recipe's ratio, layers, drafts, adapters or restored projections do not fit this model.
            HybridError: single KV heads of this model cannot stream, or it cannot have learned sinks.
        """
        hybrid, base, train = self.recipe.hybrid, self.spec(BASE), self.recipe.train
        if hybrid.select == PER_PROMPT and base.sliding_layers:
            raise UserError(
                f"hybrid.select: {PER_PROMPT}: {len(base.sliding_layers)} layers of this base have a window already, and prompts "
                "choose among full layers alone only where all are. Fix: set hybrid.select to static"
            )
        number_that_stream(hybrid, base, self.kv_heads)
        if hybrid.granularity == "kv_head" or hybrid.sink == "learned":
            some = hybrid.model_copy(update={"strategy": "periodic"})  # any: there are no scores yet
            hybrid_config(self.base_config, choose_spec(some, base, self.kv_heads, self.recipe.seed))
        self._check_drafts()
        if train is None:
            return
        with torch.device("meta"):
            model = build_hybrid(self.base_config, base_spec(self.base_config.to_dict()))
        if train.restore_query_key:
            check_restorable(model)
        if self.recipe.lora is not None:
            check_names(self.recipe.lora, model)

    def choose(self, profile: LayerProfile | None) -> None:
        """Decide on what streams in every hybrid and write it down; nothing of one whose prompts choose."""
        hybrid, base, seed = self.recipe.hybrid, self.spec(BASE), self.recipe.seed
        count = self.number_of_layers(profile)
        chosen: dict[str, Chosen] = {CONVERTED: ()}
        if hybrid.select != PER_PROMPT:
            spec = choose_spec(hybrid, base, self.kv_heads, seed, profile)
            chosen[CONVERTED] = recorded(spec, self.kv_heads)
        for strategy in hybrid.compare:
            as_many = dict.fromkeys((*NAMED, *HOW_MANY)) | {"lazy_layer_ratio": count / len(base.full_in_base)}
            as_many |= {"strategy": strategy, "granularity": "layer"}
            chosen[converted_by(strategy)] = choose_layers(hybrid.model_copy(update=as_many), base, seed, profile)
        write_json(self.paths.layers, chosen)

    def are_chosen(self) -> bool:
        """Whether what streams in every hybrid is written down."""
        return {*self.converted()} <= read_chosen(self.paths.layers).keys()

    def number_of_layers(self, profile: LayerProfile | None) -> int:
        """How many layers stream; by granularity kv_head, how many layers have the KV cache nearest to that of the heads."""
        hybrid, base = self.recipe.hybrid, self.spec(BASE)
        if hybrid.granularity == "layer":
            return number_that_stream(hybrid, base, self.kv_heads, profile)
        spec = choose_spec(hybrid, base, self.kv_heads, self.recipe.seed, profile)
        return nearest_number_of_layers(spec, self.kv_heads)

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer."""
        return kv_heads(self.base_config.to_dict())

    def spec(self, variant: str) -> HybridSpec:
        """The spec of `variant`: nothing streams in the base, what was chosen streams in the trained model."""
        hybrid = self.recipe.hybrid
        base = base_spec(self.base_config.to_dict(), hybrid.scored_w_sink, hybrid.w_recent)
        if variant == BASE:
            return base
        chosen = read_chosen(self.paths.layers)[CONVERTED if variant == TRAINED else variant]
        learned = hybrid.sink == "learned"
        return spec_of(chosen, base.num_layers, self.kv_heads, hybrid.w_sink, hybrid.w_recent, learned).on(base)

    def per_prompt(self, variant: str) -> PerPrompt | None:
        """How prompts choose the layers of `variant`; None: its layers are chosen already."""
        hybrid, base = self.recipe.hybrid, self.spec(BASE)
        if variant != CONVERTED or hybrid.select != PER_PROMPT:
            return None
        return PerPrompt(base.num_layers - number_that_stream(hybrid, base, self.kv_heads), hybrid.calibration.w_last)

    def draft(self, variant: str, eval_config: Eval) -> Draft | None:
        """The draft of `variant` in an evaluation; None: there is none.

        Raises:
            UserError: it would be the model itself.
        """
        if eval_config.draft is None:
            return None
        streaming = self.spec(CONVERTED) if eval_config.draft == "hybrid" else eval_config.draft_layers
        return Draft.of(self.spec(variant), streaming, eval_config.draft_length)

    def _check_drafts(self) -> None:
        base = base_spec(self.base_config.to_dict(), w_recent=self.recipe.hybrid.w_recent)
        for _, part in all_parts(self.recipe):
            if isinstance(part, Eval) and part.draft is not None:
                Draft.of(base, part.draft_layers, part.draft_length)

    def sinks(self, variant: str) -> Path | None:
        """The file of the learned sinks with which a hybrid begins; None where the recipe has none."""
        if self.recipe.hybrid.sink != "learned" or variant == BASE:
            return None
        return self.paths.sinks(CONVERTED if variant == TRAINED else variant)

    def load(self, variant: str, dtype: torch.dtype) -> HybridForCausalLM:
        if variant != TRAINED:
            return load_for_inference(self.recipe.model, self.spec(variant), dtype, sinks=self.sinks(variant))
        return self.load_from(self.paths.trained, dtype)

    def load_from(self, weights: Path, dtype: torch.dtype) -> HybridForCausalLM:
        """The model that training left in a folder: the trained one, or that of a checkpoint."""
        model = self.recipe.model
        load_base = partial(load_for_inference, model, self.spec(TRAINED), sinks=self.sinks(TRAINED))
        trained = load_trained(self.recipe, weights, load_base, dtype).model
        if dtype == compute_dtype(model.dtype):  # merged in fp32 perhaps, where the kernel that the recipe names need not work
            trained.set_attention_kernel(model.attention)
        return trained

    def fingerprint(self, variant: str) -> str:
        """Follows from all that decides what the variant computes: weights, streaming layers, and its training."""
        training = self._training() if variant == TRAINED else None
        by_prompt = self.per_prompt(variant)
        chosen = [] if by_prompt is None else [by_prompt]
        known = (self._base_fingerprint(), self.recipe.model.dtype, self.spec(variant), training)
        return hash_of(*known, *chosen, *self._beside_layers(variant))

    def _training(self) -> dict[str, Any]:
        """All settings that decide the trained weights, of which some may have changed without effect since."""
        settings = identity_of(self.recipe)
        for name in settings_that_may_change() - {"hybrid.compare", *(f"train.{name}" for name in IDENTIFYING)}:
            part, _, inner = name.partition(".")
            (settings[part] if inner and settings[part] else settings).pop(inner or part, None)
        if self.recipe.train is not None:
            unchanged = as_trained(self.paths, self.recipe.train)
            if self.recipe.train.final_weights == "best":
                unchanged.pop("keep_best")
            settings["train"] |= unchanged
        settings["hybrid"]["compare"] = compared_when_trained(self.paths, self.recipe)
        return settings

    def fingerprint_of(self, weights: Path) -> str:
        """As `fingerprint`, of the model in a folder that training left: it follows from the files themselves."""
        files = read_json(weights / MANIFEST, "checkpoint manifest")["files"]
        return hash_of(self._base_fingerprint(), self.recipe.model.dtype, self.spec(TRAINED), files, *self._beside_layers(TRAINED))

    def _beside_layers(self, variant: str) -> list[Any]:
        """What a hybrid has beside the repr of its spec: learned sinks, by their hash, and split layers."""
        file, split = self.sinks(variant), self.spec(variant).split_layers
        return [*([] if file is None else [file_hash(file)]), *([split] if split else [])]

    def _base_fingerprint(self) -> str:
        return read_json(self.paths.inputs, "record of a run's inputs")["model.base"]

    def to_evaluate(self) -> list[str]:
        """Every variant that an evaluation names, in the order of the results table."""
        wanted = {variant for eval_config in self.recipe.eval for variant in self.of(eval_config)}
        return [variant for variant in (BASE, *self._compared(), CONVERTED, TRAINED) if variant in wanted]

    def of(self, eval_config: Eval | HeldoutLoss | HeldoutKL) -> list[str]:
        """The variants that an evaluation names; with `converted` come the hybrids of `hybrid.compare`."""
        variants = eval_config.variants or []
        return [*variants, *(self._compared() if CONVERTED in variants else [])]

    def is_measured(self, variant: str) -> bool:
        """Whether every evaluation that names the variant has its scores."""
        return all(self.paths.scores(variant, str(each.name)).exists() for each in self.recipe.eval if variant in self.of(each))

    def converted(self) -> list[str]:
        """The hybrids before training: the recipe's own, and those that it compares."""
        return [CONVERTED, *self._compared()]

    def _compared(self) -> list[str]:
        return [converted_by(strategy) for strategy in self.recipe.hybrid.compare]
