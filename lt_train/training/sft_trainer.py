"""TRL's SFTTrainer with eight changes: a distillation loss, an exact evaluation loss, no loss of repeated rows, a stop at NaN, an
error for a full disk, shards of sequences, a learning rate for learned sinks, and no model card.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerControl
from trl import SFTTrainer

from lt_train.dataset.examples import IGNORED, Example
from lt_train.inference.sinks_file import learned_sinks
from lt_train.runtime.errors import UserError, more
from lt_train.training.checkpoints import newest_checkpoint, reporting_write_errors
from lt_train.training.distillation.loss import Distillation
from lt_train.training.samples import SAMPLE_TENSORS, samples_in
from lt_train.training.sequence_parallel import Collator, ShardedSequences

SAMPLES_NAMED = 20
"""The largest number of samples named in an error."""


class HybridSFTTrainer(SFTTrainer):
    """Trains hybrid classes. Every kernel of theirs isolates packed documents by `position_ids`, which TRL's padding-free batches
    need; TRL's fused head computes the loss without logits of sequence length x vocab_size.
    """

    data_collator: Collator
    control: TrainerControl
    examples: Sequence[Example] = ()
    heldout: Sequence[Example] = ()
    _step_batches: tuple[int, list[Mapping[str, torch.Tensor]]] = (-1, [])  # (steps done, batches of the step after them)
    distillation: Distillation | None = None
    sharded_sequences: ShardedSequences | None = None
    """Set with sequence parallelism. Held-out samples are not sharded: one process evaluates each."""
    sink_learning_rate: float | None = None
    """Peak learning rate of learned sinks."""
    _logged_step = 0  # the last step whose terms of the distilled loss are logged

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.distillation.terms_of(model, inputs) as terms:
            sft = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # As in TRL: num_items_in_batch counts the answer tokens of all processes, whose gradients are then averaged.
        counts_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        tokens = torch.as_tensor(terms.tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if not self.distillation.means.sums:
            self._logged_step = self.state.global_step
        return self.distillation.loss(sft, terms, (self.accelerator.num_processes if counts_all else 1) / tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.distillation is not None and "loss" in logs:
            means = self.distillation.means.take(self.state.global_step - self._logged_step)
            logs = logs | {name: self.accelerator.gather(value).mean().item() for name, value in means.items()}
        super().log(logs, start_time)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """With the logits of learned sinks in a group of their own: with its learning rate, and without weight decay, which would
        pull them to 0, where they are no smaller."""
        optimizer = super().create_optimizer(model)
        sinks = {id(x) for x in learned_sinks(self.model if model is None else model).values() if x.requires_grad}
        if sinks and self.sink_learning_rate is not None:
            own = [x for group in optimizer.param_groups for x in group["params"] if id(x) in sinks]
            for group in optimizer.param_groups:
                group["params"] = [x for x in group["params"] if id(x) not in sinks]
            optimizer.add_param_group({"params": own, "lr": self.sink_learning_rate, "weight_decay": 0.0})
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        if self.sharded_sequences is None:
            return super().get_train_dataloader()
        unsharded = self.data_collator
        self.data_collator = self.sharded_sequences.sharded(unsharded)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = unsharded
        self.sharded_sequences.assign_rows(loader)
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        if batch_samples and self.accelerator.gradient_state.end_of_dataloader:
            self._ignore_repeated_rows(batch_samples[-1])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _ignore_repeated_rows(self, last_batch: dict[str, torch.Tensor]) -> None:
        """accelerate completes the last micro-batches of an epoch with rows from its beginning, so that all processes have equally
        many. These rows have no loss, so that the number of processes does not change it. Of packed rows in one micro-batch, whose
        ends it does not have, it ignores all or none."""
        sharded, alone = self.sharded_sequences, self.accelerator
        group, groups = (sharded.group, sharded.groups) if sharded else (alone.process_index, alone.num_processes)
        size = self.args.per_device_train_batch_size
        left = len(self.train_dataset) % (size * groups)
        if groups == 1 or left == 0 or left >= (group + 1) * size:
            return
        kept = max(left - group * size, 0)
        for name in last_batch.keys() & {"labels", "shift_labels"}:
            if kept == 0 or len(last_batch[name]) == size:
                last_batch[name][kept:] = IGNORED

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        batch = {name: inputs[name] for name in SAMPLE_TENSORS if name in inputs}
        if self._step_batches[0] != self.state.global_step:
            self._step_batches = (self.state.global_step, [])
        self._step_batches[1].append(batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite("the loss", loss, [batch])
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Checks the norm before the weights change: a gradient can be NaN where the loss is not, and then all later losses are."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is not None:
            self._stop_unless_finite("the norm of the gradient", torch.as_tensor(grad_norm), self._step_batches[1])
        return grad_norm

    def _stop_unless_finite(self, what: str, value: torch.Tensor, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Stop all processes if `value` is not finite in one of them; every process calls this.

        Raises:
            UserError: with the step, and the samples in `batches` of the processes in which the value is not finite.
        """
        value = value.detach().float().to(self.args.device)
        broken = [each for each in self.accelerator.gather(value.reshape(1)).tolist() if not math.isfinite(each)]
        if broken:
            named = samples_in(batches, self.examples) if not torch.isfinite(value) else []
            self._stop(f"in step {self.state.global_step + 1}: {what} is {broken[0]}", gather_object(named))

    def _stop(self, what: str, samples: Sequence[str]) -> None:
        named = ", ".join(dict.fromkeys(samples[:SAMPLES_NAMED])) or "unknown samples"
        others = f" and {len(samples) - SAMPLES_NAMED} others" if len(samples) > SAMPLES_NAMED else ""
        last = newest_checkpoint(Path(self.args.output_dir))
        kept = f"{last}, written before it, is valid" if last else "There is no checkpoint from before it"
        raise UserError(
            f"training stopped {what}, on {named}{others}. {kept}. Fix: check these samples; lower train.learning_rate, raise "
            f"train.warmup_ratio or lower train.max_grad_norm, and train in another run folder (--set name=…){more('loss-is-nan')}"
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with reporting_write_errors(Path(self.args.output_dir), f"the checkpoint of step {step}", step):
            super()._save_checkpoint(model, trial)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Negative log-likelihood per answer token over the held-out examples, in nats; every token has the same weight.

        Trainer's own loss is a mean of batch means: with samples of different lengths it depends on the batch size.
        """
        model: PreTrainedModel = self.model_wrapped
        model.eval()
        broken: list[str] = []  # the samples whose loss is not finite
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        for inputs in self.get_eval_dataloader():
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(inputs), use_cache=False, fused_lm_head=True)
            loss_B2 = torch.stack((-outputs.log_probs.double().sum(1), outputs.label_mask.double().sum(1)), dim=1)
            if not torch.isfinite(loss_B2).all():
                broken += samples_in([inputs], self.heldout)
            sums += self.accelerator.gather_for_metrics(loss_B2).sum(0)  # without the duplicates that fill the last batch
        loss, tokens = sums.tolist()
        if not math.isfinite(loss):
            self._stop(f"after step {self.state.global_step}: the held-out loss is {loss}", gather_object(broken))
        metrics = {"eval_loss": loss / tokens, "eval_tokens": int(tokens)}
        self.log(metrics)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: the export writes the card, from the results of the run."""
