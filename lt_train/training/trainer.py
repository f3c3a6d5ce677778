"""Fine-tuning of a hybrid: `train` turns examples into a folder of trained weights, and resumes a training that was interrupted."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from lt_train.dataset.examples import ExampleSet, examples_fingerprint
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.sinks_file import learned_sinks
from lt_train.inference.trained_weights import LoadModel
from lt_train.recipe.batch_size import batch_samples
from lt_train.recipe.schema import EVAL_LOSS, Recipe, Train, settings_that_may_change
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.runtime.progress import without_bars_of_transformers
from lt_train.runtime.run_paths import FINAL, TRAINING_LOG
from lt_train.runtime.tracking import Tracker
from lt_train.training.best import Best, is_published
from lt_train.training.broadcast import check_shared, decided_by_main
from lt_train.training.callbacks import (
    DueAfterStep,
    KeepBestLoss,
    ProbesDuringTraining,
    ProgressBar,
    TrainingLog,
    WriteManifest,
)
from lt_train.training.checkpoints import (
    Checkpoint,
    Settings,
    check_same_settings,
    last_valid_checkpoint,
    publish_weights,
    read_checkpoint,
    reporting_write_errors,
    valid_final,
)
from lt_train.training.dataset import training_dataset
from lt_train.training.distillation.loss import Distillation
from lt_train.training.distillation.teacher import CopiedTeacher, OwnTeacher, StoredTeacher, Teacher, hybrid_in
from lt_train.training.distillation.top_k import open_top_k
from lt_train.training.experts import gather_experts_at_once, router_loss_of_base
from lt_train.training.interruption import SaveOnSigterm
from lt_train.training.log import read_log
from lt_train.training.probes.launching import ProbeLauncher, environment_for
from lt_train.training.probes.results import ProbeResult, read_probes, track_probe
from lt_train.training.saved_shapes import full_size
from lt_train.training.sequence_parallel import shard_sequences
from lt_train.training.settings import settings_of_training, sft_config, teacher_fingerprint, trains_in_bf16, weights_dtype
from lt_train.training.sft_trainer import HybridSFTTrainer
from lt_train.training.trainable import freeze_all_but_lazy_projections, lora_config

SINK_LEARNING_RATE = 0.003
"""Of learned sinks where the recipe names none."""


@dataclass(frozen=True)
class TrainResult:
    folder: Path  # full: a hybrid checkpoint; LoRA: the adapter. load_trained reads either
    steps: int  # of its weights: with train.final_weights best, fewer than were trained; the fields below count the same steps
    train_loss: float | None  # at the last logged step
    eval_loss: float | None  # at the last evaluation, per held-out answer token; None without held-out examples
    num_tokens: int | None  # of these steps, of all processes, over all resumes
    seconds: float | None  # spent in these steps, over all resumes


@contextmanager
def deepspeed_shards_no_later_model() -> Iterator[None]:
    """accelerate's state keeps DeepSpeed's configuration, by which transformers shards every model of the process that it loads
    under ZeRO-3, or refuses to load it."""
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


@deepspeed_shards_no_later_model()
def train(
    recipe: Recipe,
    load_model: LoadModel,
    tokenizer: PreTrainedTokenizerBase,
    example_set: ExampleSet,
    spec: HybridSpec,
    out: Path,
    tracker: Tracker,
    report: Callable[[str], None] = print,
    teacher: Path | None = None,
    probe_command: Callable[[int], list[str]] | None = None,
) -> TrainResult:
    """Train by `recipe.train`. Called again with an unfinished `out`, it resumes; with a finished one, it returns at once.

    Every process of a distributed run calls this; only the main one writes logs and reports.

    Args:
        load_model: loads the hybrid in a dtype. It is called after TRL's configuration exists, because only then does
            `from_pretrained` shard the weights during loading, for DeepSpeed ZeRO-3.
        out: contains checkpoint-<step>/, log.jsonl, best-<step>/, probes/ and, at the end, final/.
        teacher: the folder of the teacher's log-probabilities, if train.distill.teacher is top_k.
        probe_command: the command line of a process that probes the checkpoint of a step and writes its result to
            out/probes/step-<step>/; needed with train.probes.

    Raises:
        UserError: TRL or PEFT refuses a setting, the processes do not share the folder, it was trained with other settings, or a
            loss is not finite.
        Interrupted: after SIGTERM, with or without a checkpoint of the step in progress.
    """
    assert recipe.train is not None, "the pipeline trains only recipes with a `train` part"
    train = recipe.train
    config = sft_config(recipe, train, out)  # first: it starts the processes' communication
    check_shared(out)
    data_sha256 = examples_fingerprint(example_set.train)
    settings = settings_of_training(recipe, train, spec, data_sha256, PartialState().num_processes)
    final = out / FINAL
    finished = decided_by_main(lambda: _same_settings(valid_final(final, report), settings))
    if finished is None:
        checkpoint = decided_by_main(lambda: _same_settings(last_valid_checkpoint(out, report), settings))
        best = Best(out, train.keep_best) if train.keep_best else None
        probes = _probes(train, out, probe_command, best, tracker, report)
        decided_by_main(lambda: _resume_best_and_probes(out, checkpoint, best, probes))
        try:
            if checkpoint is None or checkpoint.step < _planned_steps(checkpoint):
                trainer = _build_trainer(recipe, config, load_model, tokenizer, example_set, spec)
                trainer.distillation = _distillation(recipe, trainer, load_model, example_set, spec, teacher)
                save_on_sigterm = SaveOnSigterm(out)
                _add_callbacks(trainer, recipe, settings, best, probes, save_on_sigterm, TrainingLog(out, tracker))
                with save_on_sigterm.handling():
                    _run(trainer, checkpoint, batch_samples(train, recipe.data), report)
            if probes is not None:
                probes.wait()
        finally:
            if probes is not None:
                probes.stop()
    if finished is None or not is_published(final, train):
        finished = decided_by_main(lambda: _publish(out, final, _to_publish(out, train), report))
    return _result(out, finished)


def _to_publish(out: Path, train: Train) -> Best | None:
    return Best(out, train.keep_best) if train.final_weights == "best" and train.keep_best is not None else None


def _probes(
    train: Train,
    out: Path,
    command: Callable[[int], list[str]] | None,
    best: Best | None,
    tracker: Tracker,
    report: Callable[[str], None],
) -> ProbeLauncher | None:
    if train.probes is None:
        return None
    assert command is not None, "training with probes needs the command that starts them"

    def on_result(result: ProbeResult, weights: Checkpoint) -> None:
        track_probe(tracker, result, read_probes(out))
        for score in result.scores:
            if best is not None and best.metric == score.probe:
                best.offer(weights, score.accuracy)

    environment = environment_for(train.probes.device, os.environ)
    return ProbeLauncher(out, train.probes.steps, command, environment, on_result, report)


def _resume_best_and_probes(out: Path, checkpoint: Checkpoint | None, best: Best | None, probes: ProbeLauncher | None) -> None:
    """Finish what a kill between a checkpoint's manifest and the later callbacks left undone."""
    if best is not None and best.metric == EVAL_LOSS and checkpoint is not None:
        measured = [row[EVAL_LOSS] for row in read_log(out / TRAINING_LOG) if row["step"] == checkpoint.step and EVAL_LOSS in row]
        if measured:
            best.offer(checkpoint, measured[-1])
    if probes is not None:
        probes.resume(checkpoint.step if checkpoint else 0, _planned_steps(checkpoint) if checkpoint else 0)


def _add_callbacks(
    trainer: HybridSFTTrainer,
    recipe: Recipe,
    settings: Settings,
    best: Best | None,
    probes: ProbeLauncher | None,
    save_on_sigterm: SaveOnSigterm,
    log: TrainingLog,
) -> None:
    """Add them in the order in which they must run."""
    assert recipe.train is not None
    best_loss = best if best is not None and best.metric == EVAL_LOSS else None
    trainer.add_callback(DueAfterStep(probes, evaluate_checkpoints=best_loss is not None))
    trainer.add_callback(WriteManifest(settings, recipe.train.keep_checkpoints, recipe.lora is not None))
    trainer.add_callback(save_on_sigterm)
    if best_loss is not None:
        trainer.add_callback(KeepBestLoss(best_loss))
    if probes is not None:
        trainer.add_callback(ProbesDuringTraining(probes))
    trainer.add_callback(log)


def _build_trainer(
    recipe: Recipe,
    config: SFTConfig,
    load_model: LoadModel,
    tokenizer: PreTrainedTokenizerBase,
    example_set: ExampleSet,
    spec: HybridSpec,
) -> HybridSFTTrainer:
    assert recipe.train is not None
    data, heldout = recipe.data, example_set.heldout
    model = load_model(weights_dtype(recipe, recipe.train))
    # With a name, PEFT would load the base's config at each save and read it as a hybrid's (peft/utils/save_and_load.py,
    # get_peft_model_state_dict). The manifest and the resolved recipe contain the name of the base.
    model.name_or_path = ""
    if spec.learned_sinks and not recipe.train.deepspeed:  # DeepSpeed's optimizer has fp32 copies of its own
        for logits_H in learned_sinks(model).values():
            logits_H.data = logits_H.data.float()
    if recipe.train.parameters == "lazy_projections":
        freeze_all_but_lazy_projections(model, spec)
    if recipe.train.deepspeed:
        gather_experts_at_once(model)
    with router_loss_of_base(model, config):
        trainer = HybridSFTTrainer(
            model=model,
            args=config,
            train_dataset=training_dataset(example_set.train, max_length=data.max_length, packing=data.packing),
            eval_dataset=training_dataset(heldout, max_length=data.max_length, packing=False) if heldout else None,
            processing_class=tokenizer,
            peft_config=lora_config(recipe.lora, spec, model) if recipe.lora is not None else None,
        )
    if recipe.train.sequence_parallel > 1:
        trainer.sharded_sequences = shard_sequences(model, recipe.train.sequence_parallel)
    if spec.learned_sinks:
        trainer.sink_learning_rate = recipe.train.sink_learning_rate or SINK_LEARNING_RATE
    trainer.examples, trainer.heldout = example_set.train, heldout
    trainer.remove_callback(PrinterCallback)  # it prints every row of the log, which TrainingLog writes to log.jsonl
    return trainer


def _distillation(
    recipe: Recipe,
    trainer: HybridSFTTrainer,
    load_model: LoadModel,
    example_set: ExampleSet,
    spec: HybridSpec,
    folder: Path | None,
) -> Distillation | None:
    assert recipe.train is not None
    settings = recipe.train.distill
    if settings.weight == 0:
        return None
    layers = spec.streaming_layers if settings.hidden_weight > 0 else ()
    teacher: Teacher
    if settings.teacher == "top_k":
        assert folder is not None, "the pipeline writes the files before it trains"
        fingerprint = teacher_fingerprint(recipe, examples_fingerprint(example_set.train))
        teacher = StoredTeacher(open_top_k(folder, example_set.train, settings.top_k, settings.temperature, fingerprint))
    elif settings.teacher == "auto" and recipe.lora is not None:
        teacher = OwnTeacher(trainer.model, settings.temperature, layers)
    else:
        base = load_model(torch.bfloat16 if trains_in_bf16(recipe) else torch.float32)
        base = base.requires_grad_(False).eval().to(trainer.args.device)
        teacher = CopiedTeacher(base, settings.temperature, layers)
    return Distillation(settings, teacher, hybrid_in(trainer.model), layers)


def _run(trainer: HybridSFTTrainer, checkpoint: Checkpoint | None, batch: int, report: Callable[[str], None]) -> None:
    """Run the remaining steps, each of `batch` rows. The last one ends with an evaluation and a checkpoint."""
    progress = ProgressBar()
    if trainer.is_world_process_zero():
        trainer.add_callback(progress)
        report(_first_line(trainer, checkpoint))
        if (rows := len(trainer.train_dataset)) < batch:
            report(
                f"warning: train.batch_size: a step takes {batch:,} rows, and there are {rows:,}, so each takes these {rows:,}. "
                "Fix: lower it, or give more samples"
            )
    try:
        with without_bars_of_transformers():
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    finally:
        progress.close()


def _first_line(trainer: HybridSFTTrainer, checkpoint: Checkpoint | None) -> str:
    trainable, total = (full_size(trainer.model, trainable_only=only) for only in (True, False))
    start = f", resumed from {checkpoint.folder.name}" if checkpoint else ""
    return f"training {trainable:,} of {total:,} parameters on {len(trainer.train_dataset):,} rows{start}"


def _same_settings(found: Checkpoint | None, settings: Settings) -> Checkpoint | None:
    if found is not None:
        ignored = {f"train.{name}" for name in settings_that_may_change(Train)} - settings.keys()  # older checkpoints hold some
        held = {name: value for name, value in found.settings.items() if name not in ignored}
        check_same_settings(replace(found, settings=held), settings)
    return found


def _planned_steps(checkpoint: Checkpoint) -> int:
    """The steps of the training. Trainer takes an extra step if it resumes from the last step in mid-epoch, so `train` compares."""
    return read_json(checkpoint.folder / TRAINER_STATE_NAME, "trainer state")["max_steps"]


def _publish(out: Path, final: Path, best: Best | None, report: Callable[[str], None]) -> Checkpoint:
    """Publish the best weights in `final`; without `best`, those of the last step."""
    if best is None:
        chosen, why = last_valid_checkpoint(out, report), "the last"
        if chosen is None:
            raise UserError(
                f"{out}: the last checkpoint is missing or invalid. Fix: run the same command again to resume from a valid one"
            )
    else:
        found = best.found()
        if found is None:
            raise UserError(
                f"train.final_weights: best: no valid weights with a measured {best.metric}. Fix: see {out / 'probes'} for probes "
                "that failed, change train.probes, and run the same command again; it repeats probes without a result"
            )
        chosen, measured = found
        why = f"the best by {measured.metric} ({measured.value:.4g})"
    with reporting_write_errors(out, "the trained weights"):
        publish_weights(chosen, final)
    report(f"the trained model has the weights of step {chosen.step}, {why}")
    return read_checkpoint(final)


def _result(out: Path, finished: Checkpoint) -> TrainResult:
    rows = [row for row in read_log(out / TRAINING_LOG) if row["step"] <= finished.step]
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    return TrainResult(
        folder=finished.folder,
        steps=finished.step,
        train_loss=steps[-1]["loss"] if steps else None,
        eval_loss=evaluations[-1]["eval_loss"] if evaluations else None,
        num_tokens=steps[-1]["num_tokens"] if steps else None,
        seconds=steps[-1]["seconds"] if steps else None,
    )
