"""The stages of a run in order: profile, convert, train, evaluate, export.

Each leaves its results in the run folder, is passed over when it is done, and goes on where it was cut off.
"""

import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lt_train.dataset.examples import ExampleSet, calibration_examples, load_examples
from lt_train.evaluation.records import RecordFolder
from lt_train.export.checkpoint import export_hybrid
from lt_train.hybrid.kernels import Choice
from lt_train.hybrid.loading import hybrid_config
from lt_train.inference.loading import (
    attention_choice,
    check_vocabulary,
    eos_ids,
    load_base_config,
    load_for_inference,
    load_tokenizer,
    load_weights,
)
from lt_train.pipeline.evaluation_stage import EvaluationStage
from lt_train.pipeline.provenance import export_facts
from lt_train.pipeline.rejection_sampling import choose_traces, write_traces
from lt_train.pipeline.run_folder import RunFolder, set_aside
from lt_train.pipeline.variants import Variants
from lt_train.recipe.schema import BASE, CONVERTED, TRAINED, Recipe
from lt_train.report.results import TRACKED_COLUMNS, read_results, show_results, summary_values, tracked_rows
from lt_train.runtime.devices import compute_dtype, release_memory
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import hash_of
from lt_train.runtime.processes import this_process
from lt_train.runtime.tracking import NoTracker, Tracker, open_tracker
from lt_train.selection.picture import draw_profile
from lt_train.selection.profile import SCORED, LayerProfile, profile_layers
from lt_train.training.dataset import examples_fingerprint
from lt_train.training.distillation.top_k import write_top_k
from lt_train.training.launch import check_launch
from lt_train.training.settings import teacher_facts
from lt_train.training.trainer import train


class Pipeline:
    """One recipe's stages. Every stage first does the ones before it that are not done yet."""

    def __init__(self, recipe: Recipe, folder: RunFolder, console: Console, rank: int = 0, ranks: int = 1) -> None:
        """`rank`: this process's number among the `ranks` that train or evaluate together."""
        self.recipe = recipe
        self.folder = folder
        self.console = console
        self.rank = rank
        self.ranks = ranks
        self.attention: Choice | None = None

    def run(self) -> None:
        self.export()
        show_results(self.folder.path, self.console)

    def profile(self) -> None:
        """Score the layers by every strategy that the recipe names and that looks at the model."""
        hybrid = self.recipe.hybrid
        strategies = [name for name in (hybrid.strategy, *hybrid.compare) if name in SCORED]
        if not strategies or self.folder.is_done("profile"):
            return
        self.variants.check_choice()  # before the scoring, not after it
        self.settle_attention()
        self.say("profile", f"scoring the layers of {self.recipe.model.base} by {', '.join(strategies)}")
        with self.folder.doing("profile"):
            profile = self._score_layers(strategies)
            release_memory()  # before the others, which wait for the hybrid, load theirs
        if profile.fitting:
            self.say("profile", f"{len(profile.fitting)} samples fit inside the window, tell nothing and were passed over")

    def _score_layers(self, strategies: list[str]) -> LayerProfile:
        hybrid = self.recipe.hybrid
        model = load_for_inference(self.recipe.model, self.variants.spec(BASE), self.dtype, others_wait=True)
        calibration = calibration_examples(self.examples, hybrid.calibration, self.recipe.seed)
        return profile_layers(model, calibration, hybrid, strategies, out=self.folder.stage("profile"))

    def convert(self) -> None:
        """Choose the layers that stream and write the hybrid's config. Weights are not copied: the base's load straight into it."""
        self.profile()
        if self.folder.is_done("hybrid"):
            return
        with self.folder.doing("hybrid"):
            profile = self.layer_profile
            self.variants.choose(profile)
            spec = self.variants.spec(CONVERTED)
            hybrid_config(self.base_config, spec).save_pretrained(self.folder.stage("hybrid"))
            if profile is not None:
                draw_profile(profile, spec.lazy_layers, self.picture)
        how = f"chosen by {self.recipe.hybrid.strategy}" if self.recipe.hybrid.layers is None else "as the recipe says"
        layers = ", ".join(map(str, spec.lazy_layers))
        self.say("convert", f"{len(spec.lazy_layers)} of {spec.num_layers} layers stream, {how}: {layers}")

    def train(self) -> None:
        """Fine-tune the hybrid, where the recipe has a `train` part."""
        self._check_launch()  # before a long scoring of layers, not after it
        self.convert()
        if self.recipe.train is None or self.folder.is_done("train"):
            return
        self.settle_attention()
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.examples.counts.items())
        self.say("train", f"samples: {counts}")
        if self.layer_profile is not None:
            self.tracker.image("layer profile", self.picture)
        for entry in self.recipe.train.probes.evals if self.recipe.train.probes else ():
            self.evaluation.plan(entry)  # one that cannot be asked is told before the training, not in the midst of it
        self._write_teacher()
        with self.folder.doing("train"):
            self.train_alone(self.tracker, lambda line: self.say("train", line))

    def teacher(self) -> None:
        """Write what the training learns from before it starts.

        Raises:
            UserError: the recipe's training learns from no files.
        """
        if not self._learns_from_files:
            raise UserError(
                "this recipe's training reads no teacher from disk. With train.distill.teacher: top_k and a train.distill.weight "
                "above 0 it does"
            )
        self._write_teacher()

    def _write_teacher(self) -> None:
        """The base's likeliest tokens on the training data, with their log-probabilities."""
        if not self._learns_from_files or self.folder.is_done("teacher"):
            return
        train, examples = self.recipe.train, self.examples.train
        self.say("teacher", f"the {train.distill.top_k} likeliest next tokens of the base on {len(examples):,} samples")
        with self.folder.doing("teacher"):
            write_top_k(
                load_for_inference(self.recipe.model, self.variants.spec(BASE), self.dtype, others_wait=True),
                examples,
                self.folder.stage("teacher"),
                k=train.distill.top_k,
                temperature=train.distill.temperature,
                facts=teacher_facts(self.recipe, examples_fingerprint(examples)),
                batch_size=train.micro_batch_size,
            )
            release_memory()

    @property
    def _learns_from_files(self) -> bool:
        train = self.recipe.train
        return train is not None and train.distill.weight > 0 and train.distill.teacher == "top_k"

    def train_alone(self, tracker: Tracker, report: Callable[[str], None]) -> None:
        """The training itself: what every rank of a distributed launch does once the hybrid is decided on."""
        spec = self.variants.spec(TRAINED)
        train(
            self.recipe,
            lambda dtype: load_weights(self.recipe.model, spec, dtype),
            self.tokenizer,
            self.examples,
            spec,
            self.folder.stage("train"),
            tracker,
            report,
            teacher=self.folder.stage("teacher"),
            probe_command=self._probe_command,
        )

    def _probe_command(self, step: int) -> list[str]:
        run = [str(self.folder.path), "--step", str(step), "--parent", str(os.getpid())]
        return [sys.executable, "-m", "lt_train", "probe", *run]

    def train_along(self) -> None:
        """What ranks other than the first do when training: wait for the hybrid, then train in silence."""
        self._check_launch()
        self.folder.wait_for("hybrid")
        if self._learns_from_files:
            self.folder.wait_for("teacher")
        if not self.folder.is_done("train"):
            self.settle_attention()
            self.train_alone(NoTracker(), lambda line: None)

    def evaluate(self) -> None:
        """Measure every variant that the recipe's evaluations ask for."""
        if self._is_measured():
            self.train()
            return
        self.evaluation.check()  # before a long training, not after it
        self.settle_attention()
        if self.ranks > 1 and self.recipe.train is not None and not self.folder.is_done("train"):
            raise UserError(
                f"{self.folder.path}: not trained yet. Run lt-train train first, then evaluate in {self.ranks} processes"
            )
        self.train()
        with self.folder.doing("eval", self._evaluations):
            self.evaluation.measure_all()
            self._track_results()

    def evaluate_along(self) -> None:
        """What ranks other than the first do when evaluating: their share of the samples, in silence."""
        self.folder.wait_for("hybrid" if self.recipe.train is None else "train")
        if not self._is_measured():
            self.evaluation.measure_all()

    def sample(self) -> None:
        """Draw answers as the recipe's `sample` part says, and write the right ones as training data."""
        sample = self.recipe.sample
        if sample is None:
            raise UserError("this recipe has no `sample` part; it says which problems to answer, how often, and what to keep")
        self.settle_attention()
        (variant,) = sample.of
        {BASE: lambda: None, CONVERTED: self.convert, TRAINED: self.train}[variant]()
        self.say("sample", f"{variant}: {sample.samples} answers to each problem of {sample.benchmark}")
        out = self.folder.stage("sample") / variant / sample.name
        plan = self.evaluation.ask(sample, variant, self.variants.load(variant, self.dtype), out)
        records = RecordFolder(out, plan.fingerprint).read()
        choice = choose_traces([records[key] for key in plan.keys if key in records], sample)
        write_traces(out, choice, plan.questions)
        self.say("sample", ", ".join(f"{name} {count:,}" for name, count in choice.counts.items()))
        self.say("sample", f"to train on them: data.source: {out / 'traces.jsonl'}, data.format: prompt_response")

    def export(self) -> None:
        """Write the hybrid as a checkpoint that loads without lt_train, and check that it does."""
        self.evaluate()
        out, key = self.folder.stage("export"), hash_of(self.recipe.export, read_results(self.folder.path))
        if self.folder.is_done("export", key):
            return
        if self.folder.is_marked("export"):  # finished with other settings or scores
            self.say("export", f"the former export now lies in {set_aside(out)}")
        last = CONVERTED if self.recipe.train is None else TRAINED
        self.say("export", f"writing the {last} hybrid to {out}")
        template = self.recipe.prompt.chat_template
        with self.folder.doing("export", key):
            export_hybrid(
                self.variants.load(last, torch.float32),
                self.tokenizer,
                out,
                export_facts(self.recipe, self.folder.path, self.examples.counts),
                dtype=self._export_dtype(),
                chat_template=Path(template).read_text(encoding="utf-8") if template else None,
                report=lambda line: self.say("export", line),
            )

    def settle_attention(self) -> None:
        """Say once what computes attention here, and why.

        Raises:
            UserError: what the recipe names cannot, or cannot train as the recipe wants to.
        """
        if self.attention is None:
            self.attention = attention_choice(self.recipe.model, self.base_config, trains=self.recipe.train is not None)
            if self.rank == 0:
                self.say("attention", f"{self.attention.name}: {self.attention.reason}")

    def close(self) -> None:
        """Finish what outlives a stage. Call it in any case."""
        if "tracker" in self.__dict__:
            self.tracker.finish()

    # What the stages share, made when first asked for

    @cached_property
    def base_config(self) -> PreTrainedConfig:
        return load_base_config(self.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def examples(self) -> ExampleSet:
        check_vocabulary(self.recipe.model, self.base_config, self.tokenizer)
        return load_examples(
            self.recipe.data,
            self.recipe.prompt,
            self.tokenizer,
            model_max_length=self.base_config.max_position_embeddings,
            seed=self.recipe.seed,
            eos_ids=eos_ids(self.recipe.model),
        )

    @cached_property
    def variants(self) -> Variants:
        return Variants(self.recipe, self.folder, self.base_config)

    @cached_property
    def evaluation(self) -> EvaluationStage:
        return EvaluationStage(
            self.recipe,
            self.folder,
            self.variants,
            self.base_config,
            self.tokenizer,
            heldout=lambda: self.examples.heldout,
            dtype=self.dtype,
            rank=self.rank,
            ranks=self.ranks,
            report=lambda line: self.say("evaluate", line),
        )

    @cached_property
    def tracker(self) -> Tracker:
        return open_tracker(self.recipe.track.wandb, self.recipe.track.project, self.folder.path, self.recipe.model_dump())

    @property
    def layer_profile(self) -> LayerProfile | None:
        path = self.folder.stage("profile") / "profile.json"
        return LayerProfile.load(path) if path.exists() else None

    @property
    def picture(self) -> Path:
        return self.folder.stage("profile") / "profile.png"

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.recipe.model.dtype)

    def say(self, stage: str, line: str) -> None:
        self.console.print(f"[bold]{stage:<9}[/bold] {line}", highlight=False, soft_wrap=True)

    def _track_results(self) -> None:
        results = read_results(self.folder.path)
        self.tracker.summary(summary_values(results))
        for name in dict.fromkeys(result.evaluation for result in results):
            rows = tracked_rows([result for result in results if result.evaluation == name])
            self.tracker.table(f"results/{name}", TRACKED_COLUMNS, rows)

    @property
    def _evaluations(self) -> str:
        return hash_of(self.recipe.eval)

    def _is_measured(self) -> bool:
        return not self.recipe.eval or self.folder.is_done("eval", self._evaluations)

    def _check_launch(self) -> None:
        if self.recipe.train is not None and not self.folder.is_done("train"):
            check_launch(self.recipe, self.recipe.train, this_process())

    def _export_dtype(self) -> torch.dtype:
        if self.recipe.export.dtype == "auto":
            return self.base_config.dtype or torch.float32
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.recipe.export.dtype]
