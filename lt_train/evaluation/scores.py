"""Results of an evaluation: the two kinds of scores.json, made of records or losses, written and read back, and the difference
between two of a kind.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from lt_train.benchmarks import BENCHMARKS, Benchmark
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
from lt_train.runtime.run_paths import SCORES

VERSION = 4
"""Of scores.json. Raise it with every change of what a field means or is called."""

READABLE_VERSIONS = (3, VERSION)

RENAMED_SINCE_3 = {"lengths_right": "lengths_correct", "lengths_wrong": "lengths_incorrect"}

ADDED_SINCE_3 = {"truncated_as", "accuracy_by_truncated_as", "from_last"}

TruncatedAs = Literal["incorrect", "graded"]
"""How answers that reach max_new_tokens count: as incorrect whatever their text, or by their text."""


@dataclass(frozen=True)
class AnswerScores:
    """Graded answers: `samples` to each of `problems`, the first of the `available` ones.

    Attributes:
        accuracy: avg@n, the mean score of the samples: the fraction of correct ones where an answer is correct or incorrect.
            Standard errors are over problems (None for a single problem).
        majority: maj@n, the score of the most frequent answer, whether samples that gave it were truncated or not. ties: problems
            whose vote was tied, each counting as the mean of the tied answers.
        truncated: fraction of samples that reached max_new_tokens. unanswered: fraction that gave no answer.
        grading_errors: samples whose answer could not be judged, and counts as incorrect.
        tokens_per_second: new tokens by the time spent on them, over all samples.
        by_problem: mean score of each problem's samples.
        interval: 95 % interval of the accuracy, over problems; None for a single problem.
        pass_at: pass@k by k, for k = 1, 2, 4, … and n.
        from_phrase: fraction of samples whose answer stood in no box but after words like "the answer is". from_last: fraction
            whose answer nothing names, so that the last formula or number was taken.
        lengths_correct, lengths_incorrect: tokens of the correct and the incorrect samples. thinking: tokens before the reasoning
            was closed, of the samples that closed it. None: there are no such samples.
        partial: some of the requested samples are `missing`. Short answers are done first, so such scores are biased towards
            problems with short answers. Problems without any sample are not among `problems`.
        truncated_as: how truncated answers count in accuracy, pass_at and by_problem; always graded by their text where the
            benchmark itself limits their length.
        accuracy_by_truncated_as: the accuracy both ways; empty in files of version 3.
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
    lengths_correct: Lengths | None = None
    lengths_incorrect: Lengths | None = None
    thinking: Lengths | None = None
    partial: bool = False
    missing: int = 0
    truncated_as: TruncatedAs = "incorrect"
    accuracy_by_truncated_as: dict[TruncatedAs, Mean] = field(default_factory=dict)
    from_last: float = 0.0

    @property
    def mean(self) -> Mean:
        return Mean(self.accuracy, self.standard_error, self.problems)

    @property
    def truncated_text(self) -> str:
        how = "count as incorrect" if self.truncated_as == "incorrect" else "are graded by their text"
        return f"truncated answers {how}"


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

KINDS: dict[str, type[AnswerScores] | type[LossScores]] = {kind.kind: kind for kind in (AnswerScores, LossScores)}


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
    truncated_as: TruncatedAs = "incorrect",
) -> AnswerScores:
    """The scores over exactly `samples` samples (0, 1, …) of each of `problems` (ids); more records may be there.

    Args:
        equivalent: whether two extracted answers are equal, for the majority vote.
        allow_partial: score what is there, and mark it.

    Raises:
        UserError: a sample is missing, so the score would be of another set than was requested; or there is none at all.
    """
    by_problem, missing = _requested(records, problems, samples, benchmark, allow_partial)
    counted = [record for found in by_problem.values() for record in found]
    means = {way: {problem: fmean(score(each, way) for each in found) for problem, found in by_problem.items()} for way in WAYS}
    accuracies = {way: mean_over_problems(list(of_problems.values())) for way, of_problems in means.items()}
    counts = [(sum(score(each, truncated_as) == 1 for each in found), len(found)) for found in by_problem.values()]
    votes = [vote(found, equivalent) for found in by_problem.values()]
    accuracy, majority = accuracies[truncated_as], mean_over_problems([vote.score for vote in votes])
    tokens, seconds = sum(record.tokens for record in counted), sum(record.seconds for record in counted)
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
        truncated=fraction(record.truncated for record in counted),
        unanswered=fraction(record.extracted is None for record in counted),
        grading_errors=sum(record.grading_error is not None for record in counted),
        tokens=tokens,
        tokens_per_sample=tokens / len(counted),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        fingerprint=fingerprint,
        by_problem=means[truncated_as],
        interval=accuracy_interval(list(means[truncated_as].values())),
        pass_at={k: mean_pass_at_k(counts, k) for k in ks_up_to(min(n for _, n in counts))},
        from_phrase=fraction(record.extracted_from == "phrase" for record in counted),
        lengths_correct=lengths_of([record.tokens for record in counted if score(record, truncated_as) == 1]),
        lengths_incorrect=lengths_of([record.tokens for record in counted if score(record, truncated_as) != 1]),
        thinking=lengths_of([record.thinking_tokens for record in counted if record.thinking_tokens is not None]),
        partial=missing > 0,
        missing=missing,
        truncated_as=truncated_as,
        accuracy_by_truncated_as=accuracies,
        from_last=fraction(record.extracted_from == "last" for record in counted),
    )


def _requested(
    records: Mapping[tuple[str, int], SampleRecord], problems: Sequence[str], samples: int, benchmark: str, allow_partial: bool
) -> tuple[dict[str, list[SampleRecord]], int]:
    """The records of the requested samples by problem, and how many are missing. Raises as `answer_scores`."""
    wanted = {problem: [(problem, sample) for sample in range(samples)] for problem in problems}
    missing = [key for keys in wanted.values() for key in keys if key not in records]
    if missing and (not allow_partial or len(missing) == samples * len(problems)):
        problem, sample = missing[0]
        raise UserError(
            f"{benchmark}: {len(missing)} of {samples * len(problems)} samples are missing, such as sample {sample} of problem "
            f"{problem}. Fix: run the evaluation again to draw them"
            + ("" if allow_partial else ", or score what is there with `allow_partial: true`")
        )
    there = {problem: [records[key] for key in keys if key in records] for problem, keys in wanted.items()}
    return {problem: found for problem, found in there.items() if found}, len(missing)


WAYS: tuple[TruncatedAs, ...] = ("incorrect", "graded")


def truncated_as_for(benchmark: Benchmark, requested: TruncatedAs) -> TruncatedAs:
    """How truncated answers count: as requested, or by their text where the benchmark itself limits their length."""
    return requested if benchmark.truncated_is_incorrect else "graded"


def score(record: SampleRecord, truncated_as: TruncatedAs) -> float:
    return record.text_score if truncated_as == "graded" else record.score


def vote(records: Sequence[SampleRecord], equivalent: Callable[[str, str], bool]) -> Vote:
    """The vote of one problem's samples. Truncated samples vote, too, and an answer counts by its text. An answer that could not be
    judged is not compared again: it equals its like only.
    """
    unjudged = {record.extracted for record in records if record.grading_error is not None}

    def same(first: str, second: str) -> bool:
        return first not in unjudged and second not in unjudged and equivalent(first, second)

    return majority_vote([(record.extracted, record.text_score) for record in records], same)


def ks_up_to(n: int) -> list[int]:
    return sorted({n, *(2**power for power in range(n.bit_length()))})


def fraction(flags: Iterable[bool]) -> float:
    return fmean(map(float, flags))


def difference(first: Scores, second: Scores) -> Difference:
    """first - second with a 95 % interval, paired by problem or sample.

    Raises:
        ValueError: they are of different kinds, benchmarks or problems, or count truncated answers differently.
    """
    if first.benchmark != second.benchmark:
        raise ValueError(f"cannot compare scores of {first.benchmark} and {second.benchmark}")
    if isinstance(first, AnswerScores) and isinstance(second, AnswerScores):
        if first.truncated_as != second.truncated_as:
            raise ValueError(f"cannot compare truncated: {first.truncated_as} with truncated: {second.truncated_as}")
        return paired_difference(first.by_problem, second.by_problem)
    if isinstance(first, LossScores) and isinstance(second, LossScores):
        return paired_loss_difference(first.by_sample, second.by_sample)
    raise ValueError(f"cannot compare {first.kind} with {second.kind}")


def write_scores(path: Path, scores: Scores) -> None:
    files.write_json(path, {"kind": scores.kind, "version": VERSION, **asdict(scores)})


def read_scores(path: Path) -> Scores:
    """
    Raises:
        UserError: the file cannot be read, is incomplete, or is not a scores.json of a version that this one reads.
    """
    found = files.read_json(path, SCORES)
    kind = KINDS.get(found.pop("kind", None)) if isinstance(found, dict) else None
    if kind is None:
        raise UserError(f"{path}: not a scores.json of this version of lt_train. Fix: delete it and run again")
    if (version := found.pop("version", 1)) not in READABLE_VERSIONS or isinstance(version, bool):
        raise UserError(
            f"{path}: not a scores.json of this version of lt_train: the file is of version {version}, this is {VERSION}. "
            f"Fix: delete it and run again"
        )
    if version == 3:
        found = {RENAMED_SINCE_3.get(name, name): value for name, value in found.items()}
        if kind is AnswerScores and found.get("benchmark") in BENCHMARKS:
            found["truncated_as"] = truncated_as_for(BENCHMARKS[found["benchmark"]], "incorrect")
    names = {each.name for each in fields(kind)}
    if (version == VERSION and found.keys() != names) or not names - ADDED_SINCE_3 <= found.keys() <= names:
        raise UserError(f"{path}: not a scores.json of this version of lt_train. Fix: delete it and run again")
    try:
        return TypeAdapter[Scores](kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: not a complete scores.json ({fault}). Fix: delete it and run again") from error


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
