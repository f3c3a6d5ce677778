"""The held-out loss, and the divergence from the base on the same samples, as evaluations: samples checked, scores kept."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lt_train.dataset.examples import Example, samples_fingerprint
from lt_train.evaluation.base_answers import BaseAnswers
from lt_train.evaluation.loss import answer_divergences, answer_losses
from lt_train.evaluation.records import Fingerprint
from lt_train.evaluation.scores import LossScores, finished_scores, write_scores
from lt_train.evaluation.statistics import TokenLoss, mean_loss
from lt_train.recipe import schema as recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.progress import show_progress
from lt_train.runtime.run_paths import SCORES


def evaluate_heldout_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    eval_config: recipe.HeldoutLoss,
    out: Path,
    *,
    model_fingerprint: str,
    progress: bool = True,
) -> LossScores:
    """The mean loss per answer token over the first `limit` examples; `out` gets scores.json.

    Raises:
        UserError: there are no examples, or `out` holds scores of something else.
    """
    identity = {"model": model_fingerprint}
    return _evaluate(
        lambda chosen: answer_losses(model, chosen, eval_config.batch_size), examples, eval_config, out, identity, progress
    )


def evaluate_heldout_kl(
    model: PreTrainedModel,
    base: Callable[[], BaseAnswers],
    examples: Sequence[Example],
    eval_config: recipe.HeldoutKL,
    out: Path,
    *,
    model_fingerprint: str,
    base_fingerprint: str,
    progress: bool = True,
) -> LossScores:
    """Mean KL(base || model) per answer token over the first `limit` examples; `out` gets scores.json.

    Args:
        base: returns the base's states on those examples; not called where the scores are there already.

    Raises:
        UserError: there are no examples, or `out` holds scores of something else.
    """

    def divergences(chosen: Sequence[Example]) -> Iterator[tuple[Example, TokenLoss]]:
        return answer_divergences(model, base(), chosen, eval_config.batch_size)

    return _evaluate(divergences, examples, eval_config, out, {"model": model_fingerprint, "base": base_fingerprint}, progress)


def _evaluate(
    measure: Callable[[Sequence[Example]], Iterator[tuple[Example, TokenLoss]]],
    examples: Sequence[Example],
    eval_config: recipe.HeldoutLoss | recipe.HeldoutKL,
    out: Path,
    identity: Fingerprint,
    progress: bool,
) -> LossScores:
    chosen = examples[: eval_config.limit]
    check_heldout(chosen, eval_config.benchmark)
    fingerprint = {**identity, "benchmark": eval_config.benchmark, "examples": samples_fingerprint(chosen)}
    done = finished_scores(out / SCORES, fingerprint)
    if isinstance(done, LossScores):
        return done
    losses: dict[str, TokenLoss] = {}
    with show_progress(f"evaluating {eval_config.name}", total=len(chosen), shown=progress) as bar:
        for example, loss in measure(chosen):
            losses[example.id] = loss
            bar.advance()
    mean = mean_loss([losses[example.id] for example in chosen])
    scores = LossScores(
        benchmark=eval_config.benchmark,
        samples=mean.n,
        tokens=sum(loss.tokens for loss in losses.values()),
        loss=mean.value,
        standard_error=mean.standard_error,
        fingerprint=fingerprint,
        by_sample={example.id: losses[example.id] for example in chosen},
    )
    write_scores(out / SCORES, scores)
    return scores


def check_heldout(examples: Sequence[Example], benchmark: str) -> None:
    if not examples:
        raise UserError(f"{benchmark}: no samples are held out. Fix: set data.heldout to the number of samples to set aside")
    if len({example.id for example in examples}) != len(examples):
        raise UserError(f"{benchmark}: two held-out samples have one id. Fix: give every row of the data an id of its own")
