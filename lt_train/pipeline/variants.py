"""The models that a run compares: the base, the hybrid before training by each way to choose its layers, the trained hybrid."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.loading import load_for_inference
from lt_train.inference.trained_weights import load_trained
from lt_train.pipeline.keys import as_trained
from lt_train.recipe.evaluations import BASE, CONVERTED, TRAINED
from lt_train.recipe.schema import Eval, HeldoutKL, HeldoutLoss, Recipe, converted_by, identity_of, settings_that_may_change
from lt_train.runtime.devices import compute_dtype
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.fingerprints import hash_of
from lt_train.runtime.run_paths import MANIFEST, RunPaths
from lt_train.selection.choose import choose_layers, explicit_layers, number_of_lazy_layers
from lt_train.selection.profile import LayerProfile
from lt_train.training.trainable import check_names

PUBLISHING = ("keep_best", "final_weights", "restore_query_key", "deepspeed")
"""Settings of a training that may change afterwards, and that a fingerprint holds all the same (see `as_trained`)."""


@dataclass(frozen=True)
class Variants:
    """Which layers stream in each variant of a run, kept in hybrid/layers.json, and how to load each."""

    recipe: Recipe
    paths: RunPaths
    base_config: PreTrainedConfig

    def check_fits(self) -> None:
        """
        Raises:
            UserError: the recipe's ratio, layers or adapters do not fit this model.
        """
        hybrid, num_layers = self.recipe.hybrid, self.base_config.num_hidden_layers
        if hybrid.layers is not None:
            explicit_layers(hybrid.layers, num_layers)
        elif hybrid.lazy_layer_ratio is not None:
            number_of_lazy_layers(hybrid.lazy_layer_ratio, num_layers)
        if self.recipe.lora is not None:
            with torch.device("meta"):
                check_names(self.recipe.lora, build_hybrid(self.base_config, HybridSpec(num_layers, ())))

    def choose(self, profile: LayerProfile | None) -> None:
        """Decide on the layers of every hybrid and write them down."""
        hybrid, num_layers = self.recipe.hybrid, self.base_config.num_hidden_layers
        layers = {CONVERTED: choose_layers(hybrid, num_layers, profile)}
        for strategy in hybrid.compare:
            as_many = {"strategy": strategy, "layers": None, "lazy_layer_ratio": len(layers[CONVERTED]) / num_layers}
            layers[converted_by(strategy)] = choose_layers(hybrid.model_copy(update=as_many), num_layers, profile)
        write_json(self.paths.layers, layers)

    def spec(self, variant: str) -> HybridSpec:
        """What streams in `variant`: nothing in the base, the chosen layers in the trained model."""
        lazy: list[int] = []
        if variant != BASE:
            path = self.paths.layers
            lazy = read_json(path, "choice of layers")[CONVERTED if variant == TRAINED else variant]
        hybrid = self.recipe.hybrid
        return HybridSpec(self.base_config.num_hidden_layers, tuple(lazy), hybrid.w_sink, hybrid.w_recent)

    def load(self, variant: str, dtype: torch.dtype) -> HybridForCausalLM:
        if variant != TRAINED:
            return load_for_inference(self.recipe.model, self.spec(variant), dtype)
        return self.load_from(self.paths.trained, dtype)

    def load_from(self, weights: Path, dtype: torch.dtype) -> HybridForCausalLM:
        """The model that training left in a folder: the trained one, or that of a checkpoint."""
        model = self.recipe.model
        trained = load_trained(self.recipe, weights, partial(load_for_inference, model, self.spec(TRAINED)), dtype).model
        if dtype == compute_dtype(model.dtype):  # merged in fp32 perhaps, where the kernel that the recipe names need not work
            trained.set_attention_kernel(model.attention)
        return trained

    def fingerprint(self, variant: str) -> str:
        """Follows from all that decides what the variant computes: weights, streaming layers, and its training."""
        training = self._training() if variant == TRAINED else None
        return hash_of(self._base_fingerprint(), self.recipe.model.dtype, self.spec(variant), training)

    def _training(self) -> dict[str, Any]:
        """All settings that decide the trained weights, of which some may have changed without effect since."""
        settings = identity_of(self.recipe)
        for name in settings_that_may_change() - {f"train.{name}" for name in PUBLISHING}:
            part, _, inner = name.partition(".")
            (settings[part] if inner and settings[part] else settings).pop(inner or part, None)
        if self.recipe.train is not None:
            unchanged = as_trained(self.paths, self.recipe.train)
            if self.recipe.train.final_weights == "best":
                unchanged.pop("keep_best")
            settings["train"] |= unchanged
        return settings

    def fingerprint_of(self, weights: Path) -> str:
        """As `fingerprint`, of the model in a folder that training left: it follows from the files themselves."""
        files = read_json(weights / MANIFEST, "checkpoint manifest")["files"]
        return hash_of(self._base_fingerprint(), self.recipe.model.dtype, self.spec(TRAINED), files)

    def _base_fingerprint(self) -> str:
        return read_json(self.paths.inputs, "record of a run's inputs")["model.base"]

    def to_evaluate(self) -> list[str]:
        """Every variant that an evaluation asks for, in the order of the results table."""
        wanted = {variant for eval_config in self.recipe.eval for variant in self.of(eval_config)}
        return [variant for variant in (BASE, *self._compared(), CONVERTED, TRAINED) if variant in wanted]

    def of(self, eval_config: Eval | HeldoutLoss | HeldoutKL) -> list[str]:
        """The variants that an evaluation asks for; with `converted` come the hybrids of `hybrid.compare`."""
        variants = eval_config.variants or []
        return [*variants, *(self._compared() if CONVERTED in variants else [])]

    def _compared(self) -> list[str]:
        return [converted_by(strategy) for strategy in self.recipe.hybrid.compare]
