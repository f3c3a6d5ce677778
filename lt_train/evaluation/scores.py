"""What an evaluation says: the two kinds of scores.json, made of records or losses, written and read back, and the difference
between two of a kind.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from lt_train.evaluation.records import Fingerprint, SampleRecord, check_same_fingerprint
from lt_train.evaluation.statistics import (
    Difference,
    Interval,
    Lengths,
    Mean,
    TokenLoss,
    Vote,
    accuracy_interval,
    lengths_of,
    majority_vote,
    mean_over_problems,
    mean_pass_at_k,
    paired_difference,
    paired_loss_difference,
    student_interval,
)
from lt_train.runtime import files
from lt_train.runtime.errors import UserError

VERSION = 3
"""Of scores.json. Raise it with every change of what a field means or is called."""


@dataclass(frozen=True)
class AnswerScores:
    """Graded answers: `samples` to each of `problems`, the first of the `available` ones.

    Attributes:
        accuracy: avg@n, the mean score of the samples, which is the share of right ones where an answer is right or wrong.
            Standard errors are over problems (None for a single problem).
        majority: maj@n, the score of the most frequent answer. ties: problems whose vote was tied, each counting as the mean of
            the tied answers.
        truncated: share of samples that reached max_new_tokens. unanswered: share that gave no answer. grading_errors: samples
            whose answer could not be judged, and counts as wrong.
        tokens_per_second: new tokens by the time spent on them, over all samples.
        by_problem: mean score of each problem's samples.
        interval: 95 % interval of the accuracy, over problems; None for a single problem.
        pass_at: pass@k by k, for k = 1, 2, 4, … and n; a sample counts as right where its record says so.
        from_phrase: share of samples whose answer stood in no box but after words like "the answer is".
        lengths_right, lengths_wrong: tokens of the right and the wrong samples. thinking: tokens before the thought was closed, of
            the samples that closed one. None: there are no such samples.
        partial: the scores are of fewer samples than were asked for; `missing` so many. Short answers are done first, so such
            scores lean towards problems with short answers. Problems without any sample are not among `problems`.
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
    interval: Interval | None = None
    pass_at: dict[int, Mean] = field(default_factory=dict)
    from_phrase: float = 0.0
    lengths_right: Lengths | None = None
    lengths_wrong: Lengths | None = None
    thinking: Lengths | None = None
    partial: bool = False
    missing: int = 0

    @property
    def mean(self) -> Mean:
        return Mean(self.accuracy, self.standard_error, self.problems)


@dataclass(frozen=True)
class LossScores:
    """Nats per answer token of held-out samples: the mean negative log-likelihood (heldout_loss), or KL(base || model)
    (heldout_kl). The standard error is over samples.
    """

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

    @property
    def interval(self) -> Interval | None:
        return student_interval(self.mean)

    @property
    def is_divergence(self) -> bool:
        return self.benchmark == "heldout_kl"

    @property
    def digits(self) -> int:
        """Decimals to show. Divergences after training are often a thousandth of a loss."""
        if not self.is_divergence:
            return 3
        return 4 if self.loss >= 0.01 else 6

    @property
    def text(self) -> str:
        """Value and standard error."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.{self.digits}f}"
        return f"{self.loss:.{self.digits}f}{error}"


Scores = AnswerScores | LossScores


def answer_scores(
    records: Mapping[tuple[str, int], SampleRecord],
    problems: Sequence[str],
    samples: int,
    *,
    benchmark: str,
    available: int,
    fingerprint: Fingerprint,
    equivalent: Callable[[str, str], bool],
    allow_partial: bool = False,
) -> AnswerScores:
    """The scores over exactly `samples` samples (0, 1, …) of each of `problems` (ids); more records may be there.

    Args:
        equivalent: whether two extracted answers say the same, for the majority vote.
        allow_partial: score what is there, and mark it.

    Raises:
        UserError: a sample is missing, so the score would be of another set than was asked for; or there is none at all.
    """
    asked = {problem: [(problem, sample) for sample in range(samples)] for problem in problems}
    missing = [key for keys in asked.values() for key in keys if key not in records]
    if missing and (not allow_partial or len(missing) == samples * len(problems)):
        problem, sample = missing[0]
        raise UserError(
            f"{benchmark}: {len(missing)} of {samples * len(problems)} samples are missing, such as sample {sample} of problem "
            f"{problem}. Run the evaluation again to draw them"
            + ("" if allow_partial else ", or score what is there with `allow_partial: true`")
        )
    there = {problem: [records[key] for key in keys if key in records] for problem, keys in asked.items()}
    return scores_of(
        {problem: found for problem, found in there.items() if found},
        samples,
        benchmark,
        available,
        fingerprint,
        equivalent,
        len(missing),
    )


def scores_of(
    by_problem: Mapping[str, Sequence[SampleRecord]],
    samples: int,
    benchmark: str,
    available: int,
    fingerprint: Fingerprint,
    equivalent: Callable[[str, str], bool],
    missing: int,
) -> AnswerScores:
    records = [record for found in by_problem.values() for record in found]
    shares = {problem: fmean(record.score for record in found) for problem, found in by_problem.items()}
    counts = [(sum(record.correct for record in found), len(found)) for found in by_problem.values()]
    votes = [vote(found, equivalent) for found in by_problem.values()]
    accuracy, majority = mean_over_problems(list(shares.values())), mean_over_problems([vote.right for vote in votes])
    tokens, seconds = sum(record.tokens for record in records), sum(record.seconds for record in records)
    return AnswerScores(
        benchmark=benchmark,
        problems=len(by_problem),
        available=available,
        samples=samples,
        accuracy=accuracy.value,
        standard_error=accuracy.standard_error,
        majority=majority.value,
        majority_standard_error=majority.standard_error,
        ties=sum(vote.tie for vote in votes),
        truncated=share(record.finish_reason == "length" for record in records),
        unanswered=share(record.extracted is None for record in records),
        grading_errors=sum(record.grading_error is not None for record in records),
        tokens=tokens,
        tokens_per_sample=tokens / len(records),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        fingerprint=fingerprint,
        by_problem=shares,
        interval=accuracy_interval(list(shares.values())),
        pass_at={k: mean_pass_at_k(counts, k) for k in ks_up_to(min(n for _, n in counts))},
        from_phrase=share(record.extracted_from == "phrase" for record in records),
        lengths_right=lengths_of([record.tokens for record in records if record.correct]),
        lengths_wrong=lengths_of([record.tokens for record in records if not record.correct]),
        thinking=lengths_of([record.thinking_tokens for record in records if record.thinking_tokens is not None]),
        partial=missing > 0,
        missing=missing,
    )


def vote(records: Sequence[SampleRecord], equivalent: Callable[[str, str], bool]) -> Vote:
    """The vote of one problem's samples. An answer that could not be judged is not compared again: it equals its like only."""
    hopeless = {record.extracted for record in records if record.grading_error is not None}

    def same(first: str, second: str) -> bool:
        return first not in hopeless and second not in hopeless and equivalent(first, second)

    return majority_vote([(record.extracted, record.score) for record in records], same)


def ks_up_to(n: int) -> list[int]:
    return sorted({n, *(2**power for power in range(n.bit_length()))})


def share(flags: Iterable[bool]) -> float:
    return fmean(map(float, flags))


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
    files.write_json(path, {"kind": scores.kind, "version": VERSION, **asdict(scores)})


def read_scores(path: Path) -> Scores:
    """
    Raises:
        UserError: the file cannot be read, is cut, or is not a scores.json of this version.
    """
    found = files.read_json(path, "scores.json")
    kinds = {kind.kind: kind for kind in (AnswerScores, LossScores)}
    kind = kinds.get(found.pop("kind", None)) if isinstance(found, dict) else None
    if kind is not None and (version := found.pop("version", 1)) != VERSION:
        raise UserError(
            f"{path}: not a scores.json of this version of lt_train: the file is of version {version}, this is {VERSION}. "
            f"Delete it and run again to make it anew"
        )
    if kind is None or found.keys() != {field.name for field in fields(kind)}:
        raise UserError(f"{path}: not a scores.json of this version of lt_train. Delete it and run again to make it anew")
    try:
        return kind(**{name: PARTS.get(name, as_it_is)(value) for name, value in found.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a whole scores.json ({error}). Delete it and run again to make it anew") from error


def as_it_is(value: Any) -> Any:
    return value


def lengths_from(found: dict[str, Any] | None) -> Lengths | None:
    return None if found is None else Lengths(**found)


PARTS: dict[str, Callable[[Any], Any]] = {
    "by_sample": lambda losses: {sample: TokenLoss(**loss) for sample, loss in losses.items()},
    "interval": lambda found: None if found is None else Interval(**found),
    "pass_at": lambda means: {int(k): Mean(**mean) for k, mean in means.items()},
    "lengths_right": lengths_from,
    "lengths_wrong": lengths_from,
    "thinking": lengths_from,
}
"""How what JSON gives for a field becomes the field."""


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
