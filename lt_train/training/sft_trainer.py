"""TRL's SFTTrainer with three things changed: an exact evaluation loss, a stop at NaN, and no model card of TRL's own."""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from lt_train.errors import UserError


class HybridSFTTrainer(SFTTrainer):
    """Trains hybrid classes. They isolate packed documents by `position_ids` in every kernel, which is all that TRL's padding-free
    batches ask of an attention; the loss comes from TRL's fused head, which never holds sequence x vocabulary logits.
    """

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"training stopped in step {self.state.global_step + 1}: the loss is {loss.item()}. The checkpoints written "
                "before it are good: lower train.learning_rate, raise train.warmup_ratio or lower train.max_grad_norm, and train "
                "into another run folder"
            )
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Negative log-likelihood per answer token over the held-out examples, in nats; every token weighs the same.

        Trainer's own is a mean of batch means: with samples of unequal length it changes with the batch size.
        """
        model: PreTrainedModel = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        for inputs in self.get_eval_dataloader():
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(inputs), use_cache=False, fused_lm_head=True)
            loss_B2 = torch.stack((-outputs.log_probs.double().sum(1), outputs.label_mask.double().sum(1)), dim=1)
            sums += self.accelerator.gather_for_metrics(loss_B2).sum(0)  # without the samples doubled to fill a last batch
        loss, tokens = sums.tolist()
        metrics = {"eval_loss": loss / tokens, "eval_tokens": int(tokens)}
        self.log(metrics)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the card is written on export, from the whole run."""
