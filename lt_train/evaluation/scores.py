"""What an evaluation says: the two kinds of scores.json, written and read back, and the difference between two of a
kind.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from lt_train import files
from lt_train.errors import UserError
from lt_train.evaluation.records import Fingerprint, check_same_fingerprint
from lt_train.evaluation.statistics import Difference, Mean, TokenLoss, paired_difference, paired_loss_difference


@dataclass(frozen=True)
class AnswerScores:
    """Graded answers: `samples` to each of `problems`, the first of the `available` ones.

    accuracy: avg@n, the share of right samples; standard errors are over problems (None for a single problem).
    majority: maj@n; ties: problems whose vote was tied, each counting as the share of right answers among the tied.
    truncated, unanswered: shares of samples that hit max_new_tokens, that gave no boxed answer; both count as wrong.
    grading_errors: samples whose answer could not be judged; they count as wrong too.
    tokens_per_second: new tokens by the time spent generating, over all samples, padding of finished rows not counted.
    by_problem: share of right samples of each problem.
    """

    kind: ClassVar[str] = "answers"

    benchmark: str
    problems: int
    available: int
    samples: int
    accuracy: float
    standard_error: float | None
    majority: float
    majority_standard_error: float | None
    ties: int
    truncated: float
    unanswered: float
    grading_errors: int
    tokens: int
    tokens_per_sample: float
    tokens_per_second: float
    fingerprint: Fingerprint
    by_problem: dict[str, float]

    @property
    def mean(self) -> Mean:
        return Mean(self.accuracy, self.standard_error, self.problems)


@dataclass(frozen=True)
class LossScores:
    """Held-out loss: mean negative log-likelihood (nats) per answer token; its standard error is over samples."""

    kind: ClassVar[str] = "loss"

    benchmark: str
    samples: int
    tokens: int
    loss: float
    standard_error: float | None
    fingerprint: Fingerprint
    by_sample: dict[str, TokenLoss]

    @property
    def mean(self) -> Mean:
        return Mean(self.loss, self.standard_error, self.samples)


Scores = AnswerScores | LossScores


def difference(first: Scores, second: Scores) -> Difference:
    """first - second with a 95 % interval, paired by problem or sample.

    Raises:
        ValueError: they are of different kinds, benchmarks or problems.
    """
    if first.benchmark != second.benchmark:
        raise ValueError(f"cannot compare scores of {first.benchmark} and {second.benchmark}")
    if isinstance(first, AnswerScores) and isinstance(second, AnswerScores):
        return paired_difference(first.by_problem, second.by_problem)
    if isinstance(first, LossScores) and isinstance(second, LossScores):
        return paired_loss_difference(first.by_sample, second.by_sample)
    raise ValueError(f"cannot compare {first.kind} with {second.kind}")


def write_scores(path: Path, scores: Scores) -> None:
    files.write_json(path, {"kind": scores.kind, **asdict(scores)})


def read_scores(path: Path) -> Scores:
    """
    Raises:
        UserError: the file cannot be read, is cut, or is not a scores.json of this version.
    """
    found = files.read_json(path, "scores.json")
    kinds = {kind.kind: kind for kind in (AnswerScores, LossScores)}
    kind = kinds.get(found.pop("kind", None)) if isinstance(found, dict) else None
    if kind is None or found.keys() != {field.name for field in fields(kind)}:
        raise UserError(f"{path}: not a scores.json of this version of lt_train. Delete it and run again to make it anew")
    return kind(**with_token_losses(found))


def with_token_losses(found: dict[str, Any]) -> dict[str, Any]:
    if "by_sample" not in found:
        return found
    return {**found, "by_sample": {sample: TokenLoss(**loss) for sample, loss in found["by_sample"].items()}}


def finished_scores(path: Path, fingerprint: Fingerprint) -> Scores | None:
    """The scores at `path`, if there are any.

    Raises:
        UserError: they are there but unreadable, or were made with another fingerprint.
    """
    if not path.exists():
        return None
    scores = read_scores(path)
    check_same_fingerprint(path, "scores", fingerprint)
    return scores
