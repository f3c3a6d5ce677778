"""Callbacks around each training step: manifests of checkpoints, probes, the log and the progress bar."""

import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lt_train.recipe.schema import EVAL_LOSS
from lt_train.runtime.files import append_json_line
from lt_train.runtime.progress import Bar
from lt_train.runtime.run_paths import TRAINING_LOG
from lt_train.runtime.tracking import Tracker
from lt_train.training.best import Best
from lt_train.training.checkpoints import (
    Settings,
    checkpoint_folder,
    read_checkpoint,
    remove_old_checkpoints,
    reporting_write_errors,
    write_manifest,
)
from lt_train.training.log import resume_log, track_row
from lt_train.training.probes.launching import ProbeLauncher
from lt_train.training.saved_shapes import check_saved_shapes, full_shapes

DISTILLED = ("sft_loss", "kl", "hidden_difference")
"""Additional columns of a distilled training: see training/distillation/loss.py."""


class DueAfterStep(TrainerCallback):
    """Requests saving, evaluation and logging after a step, in addition to Trainer's own intervals. Add it before all others."""

    def __init__(self, probes: ProbeLauncher | None, evaluate_checkpoints: bool) -> None:
        self.probes = probes
        self.evaluate_checkpoints = evaluate_checkpoints

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.probes is not None and self.probes.is_due(state.global_step, state.max_steps):
            control.should_save = True
        if self.evaluate_checkpoints and control.should_save:
            control.should_evaluate = True
        # A logged loss is a mean since the last logged step, and a checkpoint does not contain its sum: logging at each save makes
        # a resumed run log the same means.
        control.should_log = control.should_log or control.should_save
        return control


class WriteManifest(TrainerCallback):
    """Writes a checkpoint's manifest after all processes have written their files, and then deletes the oldest checkpoints.

    Trainer's own rotation (save_total_limit) deletes before this callback runs; a kill in between would leave no valid checkpoint.
    """

    def __init__(self, settings: Settings, keep: int, adapter_only: bool) -> None:
        self.settings = settings
        self.keep = keep
        self.adapter_only = adapter_only

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            out = Path(args.output_dir)
            folder = checkpoint_folder(out, state.global_step)
            check_saved_shapes(folder, full_shapes(model, trainable_only=self.adapter_only))
            with reporting_write_errors(out, f"the checkpoint of step {state.global_step}", state.global_step):
                write_manifest(folder, state.global_step, self.settings)
            remove_old_checkpoints(out, self.keep)
        PartialState().wait_for_everyone()


class KeepBestLoss(TrainerCallback):
    """Keeps the weights of the checkpoint with the lowest held-out loss. Add it after WriteManifest."""

    def __init__(self, best: Best) -> None:
        self.best = best
        self.measured: tuple[int, float] | None = None  # (step, eval_loss)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.measured = state.global_step, metrics[EVAL_LOSS]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.measured is not None and self.measured[0] == state.global_step:
            self.best.offer(read_checkpoint(checkpoint_folder(Path(args.output_dir), state.global_step)), self.measured[1])


class ProbesDuringTraining(TrainerCallback):
    """Probe the checkpoints that are due, while training continues. Add it after WriteManifest."""

    def __init__(self, probes: ProbeLauncher) -> None:
        self.probes = probes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.probes.is_busy()  # reads the result of a finished probe

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.probes.is_due(state.global_step, state.max_steps):
            return
        self.probes.wait()
        if state.is_world_process_zero:
            self.probes.add(read_checkpoint(checkpoint_folder(Path(args.output_dir), state.global_step)))
            self.probes.is_busy()  # starts it


class TrainingLog(TrainerCallback):
    """Writes train/log.jsonl and the tracker's curves: loss, learning rate, gradient norm, tokens, tokens per second; for a
    distilled training also the unweighted terms of its loss.

    `num_tokens` counts the tokens of all processes since the first step; `seconds` is the time spent in steps, over all resumes,
    without evaluation and saving.
    """

    def __init__(self, out: Path, tracker: Tracker) -> None:
        self.path = out / TRAINING_LOG
        self.tracker = tracker
        self.seconds = 0.0
        self.logged_seconds = 0.0
        self.logged_tokens = 0
        self.step_started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.logged_tokens = state.num_input_tokens_seen
        if state.is_world_process_zero:
            steps = [row for row in resume_log(self.path, state.global_step) if "loss" in row]
            self.seconds = self.logged_seconds = steps[-1]["seconds"] if steps else 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.step_started

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            row = self._training_row(logs, state.num_input_tokens_seen)
        elif "eval_loss" in logs:
            row = {"eval_loss": logs["eval_loss"], "eval_tokens": logs["eval_tokens"]}
        else:
            return  # Trainer's summary at the end, whose means cover this process alone
        row = {"step": state.global_step, **row}
        if state.is_world_process_zero:
            with reporting_write_errors(self.path.parent, f"{self.path.name} of step {state.global_step}"):
                append_json_line(self.path, row)
            track_row(self.tracker, row)

    def _training_row(self, logs: dict[str, float], num_tokens: int) -> dict[str, float]:
        seconds, tokens = self.seconds - self.logged_seconds, num_tokens - self.logged_tokens
        self.logged_seconds, self.logged_tokens = self.seconds, num_tokens
        return {
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "token_accuracy": logs["mean_token_accuracy"],
            "entropy": logs["entropy"],
            **{name: logs[name] for name in DISTILLED if name in logs},
            "tokens": tokens,
            "num_tokens": num_tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": self.seconds,
        }


class ProgressBar(TrainerCallback):
    """Steps done, the last logged loss and the time left."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = Bar("training", done=state.global_step, total=state.max_steps, shown=True)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step, self.loss)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar; also when training ends with an error."""
        if self.bar is not None:
            self.bar.stop()
