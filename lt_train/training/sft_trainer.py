"""TRL's SFTTrainer with six things changed: distillation beside its loss, an exact evaluation loss, a stop at NaN, a word about a
full disk, slices of sequences that processes share, and no model card of TRL's own.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import SFTTrainer

from lt_train.dataset.examples import Example
from lt_train.runtime.errors import UserError
from lt_train.training.checkpoints import newest_checkpoint, reporting_write_errors
from lt_train.training.distillation.loss import Distillation
from lt_train.training.samples import SAMPLE_TENSORS, samples_in
from lt_train.training.sequence_parallel import ShardedSequences

SAMPLES_NAMED = 20
"""At most, in an error."""


class HybridSFTTrainer(SFTTrainer):
    """Trains hybrid classes. They isolate packed documents by `position_ids` in every kernel, which is all that TRL's padding-free
    batches ask of an attention; the loss comes from TRL's fused head, which never holds sequence x vocabulary logits.
    """

    examples: Sequence[Example] = ()
    heldout: Sequence[Example] = ()
    _step_batches: tuple[int, list[Mapping[str, torch.Tensor]]] = (-1, [])  # (steps done, batches of the step after them)
    distillation: Distillation | None = None
    sharded_sequences: ShardedSequences | None = None
    """Set where several processes share each training sequence. Held-out samples are evaluated whole, by one process each."""
    _logged_step = 0  # up to where the parts of a distilled loss are logged

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.distillation.beside(model, inputs) as part:
            sft = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # As TRL: num_items_in_batch counts the answer tokens of all processes, whose gradients are then averaged.
        counts_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        tokens = torch.as_tensor(part.tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if not self.distillation.means.sums:
            self._logged_step = self.state.global_step
        return self.distillation.loss(sft, part, (self.accelerator.num_processes if counts_all else 1) / tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.distillation is not None and "loss" in logs:
            means = self.distillation.means.take(self.state.global_step - self._logged_step)
            logs = logs | {name: self.accelerator.gather(value).mean().item() for name, value in means.items()}
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader:
        if self.sharded_sequences is None:
            return super().get_train_dataloader()
        whole = self.data_collator
        self.data_collator = self.sharded_sequences.slicing(whole)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = whole
        self.sharded_sequences.assign_rows(loader)
        return loader

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        batch = {name: inputs[name] for name in SAMPLE_TENSORS if name in inputs}
        if self._step_batches[0] != self.state.global_step:
            self._step_batches = (self.state.global_step, [])
        self._step_batches[1].append(batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite("the loss", loss, [batch])
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Every step, before the weights move: a gradient can be NaN where the loss is not, and all later losses then are."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is not None:
            self._stop_unless_finite("the norm of the gradient", torch.as_tensor(grad_norm), self._step_batches[1])
        return grad_norm

    def _stop_unless_finite(self, what: str, value: torch.Tensor, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Stop in all processes when `value` is not finite in one of them; every process calls this.

        Raises:
            UserError: it names the step, and the samples in the `batches` of the processes where the value is not finite.
        """
        value = value.detach().float().to(self.args.device)
        broken = [each for each in self.accelerator.gather(value.reshape(1)).tolist() if not math.isfinite(each)]
        if broken:
            named = samples_in(batches, self.examples) if not torch.isfinite(value) else []
            self._stop(f"in step {self.state.global_step + 1}: {what} is {broken[0]}", gather_object(named))

    def _stop(self, what: str, samples: Sequence[str]) -> None:
        named = ", ".join(dict.fromkeys(samples[:SAMPLES_NAMED])) or "samples that cannot be told"
        more = f" and {len(samples) - SAMPLES_NAMED} others" if len(samples) > SAMPLES_NAMED else ""
        good = newest_checkpoint(Path(self.args.output_dir))
        kept = f"{good}, written before it, is whole and good" if good else "No checkpoint had been written before it"
        raise UserError(
            f"training stopped {what}, on {named}{more}. {kept}. See whether these samples are as they should be; lower "
            "train.learning_rate, raise train.warmup_ratio or lower train.max_grad_norm, and train into another run folder "
            "(--set name=…)"
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with reporting_write_errors(Path(self.args.output_dir), f"the checkpoint of step {step}", step):
            super()._save_checkpoint(model, trial)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Negative log-likelihood per answer token over the held-out examples, in nats; every token weighs the same.

        Trainer's own is a mean of batch means: with samples of unequal length it changes with the batch size.
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
            sums += self.accelerator.gather_for_metrics(loss_B2).sum(0)  # without the samples doubled to fill a last batch
        loss, tokens = sums.tolist()
        if not math.isfinite(loss):
            self._stop(f"after step {self.state.global_step}: the held-out loss is {loss}", gather_object(broken))
        metrics = {"eval_loss": loss / tokens, "eval_tokens": int(tokens)}
        self.log(metrics)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the card is written on export, from the whole run."""
