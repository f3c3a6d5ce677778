"""What the stages of a run share, each made when a stage first needs it."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lt_train.dataset.examples import Example, ExampleSet, calibration_examples
from lt_train.dataset.texts import text_examples
from lt_train.hybrid.configuration import is_hybrid
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.loading import is_declared
from lt_train.inference.loading import attention_choice, describe_proof, eos_ids, load_base_config
from lt_train.inference.tokenizer import load_checked_tokenizer
from lt_train.pipeline.evaluations import Evaluations
from lt_train.pipeline.run_folder import RunFolder
from lt_train.pipeline.variants import Variants
from lt_train.planning.shape import ModelShape, model_shape
from lt_train.recipe.schema import Recipe
from lt_train.runtime.devices import compute_dtype, dtype_name
from lt_train.runtime.errors import UserError
from lt_train.runtime.processes import Process
from lt_train.runtime.run_paths import RunPaths
from lt_train.runtime.tracking import Tracker, open_tracker
from lt_train.selection.profile import LayerProfile


@dataclass
class RunContext:
    """One recipe at work in its run folder, in one process.

    Args:
        process: the first one works in all stages and reports; the others only train or evaluate along.
    """

    recipe: Recipe
    folder: RunFolder
    console: Console
    process: Process
    _attention_is_reported: bool = field(default=False, init=False)
    _fits_base: bool = field(default=False, init=False)

    @property
    def paths(self) -> RunPaths:
        return self.folder.paths

    @property
    def dtype(self) -> torch.dtype:
        """
        Raises:
            UserError: the run has computed in another dtype before, on another machine.
        """
        self._check_dtype()
        return compute_dtype(self.recipe.model.dtype)

    def _check_dtype(self) -> None:
        precision = self.recipe.model.dtype
        if precision == "auto" and self.process.is_main:
            self.folder.check_auto_dtype(dtype_name(compute_dtype(precision)))

    @property
    def layer_profile(self) -> LayerProfile | None:
        """The scores of the layers; None where the recipe names the layers, or none are scored yet."""
        return LayerProfile.load(self.paths.layer_profile) if self.paths.layer_profile.exists() else None

    @cached_property
    def base_config(self) -> PreTrainedConfig:
        config = load_base_config(self.recipe.model)
        if not is_declared(config):
            self.report("family", describe_proof(config))
        if is_hybrid(config):
            self.report("base", f"warning: model.base: a hybrid ({config.model_type}); as a base all of its layers are full again")
        return config

    @cached_property
    def model_shape(self) -> ModelShape:
        return model_shape(self.recipe, self.base_config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_checked_tokenizer(self.recipe.model, self.base_config, self.recipe.prompt)

    @cached_property
    def examples(self) -> ExampleSet:
        """The traces; none where the recipe has no data.source."""
        if self.recipe.data.source is None:
            return ExampleSet((), (), {})
        from lt_train.dataset.loading import load_examples  # loads datasets

        examples = load_examples(
            self.recipe.data,
            self.recipe.prompt,
            self.tokenizer,
            model_max_length=self._context_length,
            seed=self.recipe.seed,
            eos_ids=eos_ids(self.recipe.model),
            folder=self.paths.data,
            progress=self.process.is_main,
        )
        self.report("data", examples.format)
        for warning in examples.warnings:
            self.report("data", f"warning: {warning}")
        return examples

    @cached_property
    def calibration(self) -> list[Example]:
        """The samples that layers are scored on: texts where the recipe names some, else training samples."""
        calibration, data, seed = self.recipe.hybrid.calibration, self.recipe.data, self.recipe.seed
        if calibration.source is None:
            return calibration_examples(self.examples, calibration, seed)
        from lt_train.dataset.loading import check_context

        check_context(data, self._context_length)
        longest = min(calibration.max_length or data.max_length, data.max_length)
        return text_examples(calibration.source, self.tokenizer, samples=calibration.samples, max_length=longest, seed=seed)

    @property
    def _context_length(self) -> int:
        return context_length(self.base_config.to_dict())

    @cached_property
    def variants(self) -> Variants:
        return Variants(self.recipe, self.paths, self.base_config)

    @cached_property
    def evaluations(self) -> Evaluations:
        return Evaluations(
            self.recipe,
            self.paths,
            self.variants,
            self.base_config,
            self.tokenizer,
            heldout=lambda: self.examples.heldout,
            dtype=self.dtype,
            rank=self.process.rank,
            world_size=self.process.count,
            report=lambda line: self.report("evaluate", line),
        )

    @cached_property
    def tracker(self) -> Tracker:
        track = self.recipe.track
        return open_tracker(
            track.wandb,
            track.project,
            self.paths.root,
            self.recipe.model_dump(),
            tensorboard=track.tensorboard,
            trackio=track.trackio,
        )

    def check_fits(self) -> None:
        """Check once that the recipe fits its base (see `Variants.check_fits`)."""
        if not self._fits_base:
            self.variants.check_fits()
            self._fits_base = True

    def check_attention(self) -> None:
        """Report once what computes attention here, and why.

        Raises:
            UserError: what the recipe names cannot compute here, or in another dtype than the run has computed before.
        """
        if not self._attention_is_reported:
            self._check_dtype()
            hybrid = self.recipe.hybrid
            needs_gradients = self.recipe.train is not None or "gates" in (hybrid.strategy, *hybrid.compare)
            choice = attention_choice(self.recipe.model, self.base_config, trains=needs_gradients)
            self.report("attention", f"{choice.name}: {choice.reason}")
            self._attention_is_reported = True

    def report(self, stage: str, line: str) -> None:
        """Print a line of a stage; only the first process prints."""
        if self.process.is_main:
            self.console.print(f"[bold]{stage:<9}[/bold] {escape(line)}", highlight=False, soft_wrap=True)

    def finish_tracking(self) -> None:
        """Wait until all that was tracked is written. Call it before the marker of a stage: what is done is not tracked again.

        Raises:
            UserError: it is not.
        """
        if "tracker" in self.__dict__ and not self._close_tracker():
            raise UserError(
                "track: a tracker's own process ended, and what it had not written yet is lost. "
                "Fix: run the same command again; it tracks what is missing"
            )

    def close(self) -> None:
        """Finish what outlives a stage. Call it in any case."""
        if "tracker" in self.__dict__:
            self._close_tracker()

    def _close_tracker(self) -> bool:
        tracker = self.tracker
        del self.tracker
        return tracker.finish()
