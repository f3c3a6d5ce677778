"""The held-out loss as an evaluation: its samples checked, its scores kept."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lt_train import recipe
from lt_train.errors import UserError
from lt_train.evaluation.loss import answer_losses
from lt_train.evaluation.plan import hash_of
from lt_train.evaluation.scores import LossScores, finished_scores, write_scores
from lt_train.evaluation.statistics import TokenLoss, mean_loss
from lt_train.examples import Example
from lt_train.progress import show_progress


def evaluate_heldout_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    entry: recipe.HeldoutLoss,
    out: Path,
    *,
    model_fingerprint: str,
    progress: bool = True,
) -> LossScores:
    """The mean loss per answer token over the first `limit` examples; `out` gets scores.json.

    Raises:
        UserError: there are no examples, or `out` holds scores of something else.
    """
    chosen = examples[: entry.limit]
    check_heldout(chosen)
    fingerprint = {"model": model_fingerprint, "benchmark": entry.benchmark, "examples": hash_examples(chosen)}
    done = finished_scores(out / "scores.json", fingerprint)
    if isinstance(done, LossScores):
        return done
    losses: dict[str, TokenLoss] = {}
    with show_progress(f"evaluating {entry.name}", total=len(chosen), shown=progress) as bar:
        for example, loss in answer_losses(model, chosen, entry.batch_size):
            losses[example.id] = loss
            bar.advance()
    mean = mean_loss([losses[example.id] for example in chosen])
    scores = LossScores(
        benchmark=entry.benchmark,
        samples=mean.n,
        tokens=sum(loss.tokens for loss in losses.values()),
        loss=mean.value,
        standard_error=mean.standard_error,
        fingerprint=fingerprint,
        by_sample={example.id: losses[example.id] for example in chosen},
    )
    write_scores(out / "scores.json", scores)
    return scores


def check_heldout(examples: Sequence[Example]) -> None:
    if not examples:
        raise UserError("heldout_loss: no samples are held out; set data.heldout to the number of samples to set aside")
    if len({example.id for example in examples}) != len(examples):
        raise UserError("heldout_loss: two held-out samples have one id, so their losses could not be told apart")


def hash_examples(examples: Sequence[Example]) -> str:
    return hash_of([[example.id, example.prompt_ids, example.answer_ids] for example in examples])
