"""The result of a checkpoint's probe: train/probes/step-<step>/result.json, written last by the probing process."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.tracking import Tracker

RESULT = "result.json"


@dataclass(frozen=True)
class ProbeScore:
    """
    Attributes:
        accuracy: mean score of the answers; its standard error is over problems (None for a single one).
        truncated: fraction of answers that reached max_new_tokens.
    """

    probe: str
    accuracy: float
    standard_error: float | None
    problems: int
    truncated: float

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.1f}"
        return f"{self.probe} {100 * self.accuracy:.1f}{error} %"


@dataclass(frozen=True)
class ProbeSample:
    """One answer for inspection. `answer` is its end."""

    probe: str
    problem: str
    answer: str
    extracted: str | None
    score: float


@dataclass(frozen=True)
class ProbeResult:
    step: int
    scores: tuple[ProbeScore, ...]
    samples: tuple[ProbeSample, ...]


def probe_folder(train: Path, step: int) -> Path:
    """The folder of one probe: weights/ while it runs, evals/<name>/ (samples and scores), output.txt, result.json."""
    return train / "probes" / f"step-{step}"


def probed_steps(train: Path) -> list[int]:
    """The steps with a probe, finished or not."""
    names = [path.name.removeprefix("step-") for path in (train / "probes").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def write_result(train: Path, result: ProbeResult) -> None:
    write_json(probe_folder(train, result.step) / RESULT, asdict(result))


def read_result(train: Path, step: int) -> ProbeResult | None:
    """The result of a step's probe, or None if there is none.

    Raises:
        UserError: the file exists but is not valid.
    """
    path = probe_folder(train, step) / RESULT
    if not path.exists():
        return None
    found = read_json(path, "result of a probe")
    try:
        scores = tuple(ProbeScore(**row) for row in found["scores"])
        samples = tuple(ProbeSample(**row) for row in found["samples"])
        return ProbeResult(found["step"], scores, samples)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a valid result of a probe ({error}). Fix: delete it and run again, which repeats it"
        ) from error


def read_probes(train: Path) -> list[ProbeResult]:
    """All results, in the order of steps."""
    return [result for step in probed_steps(train) if (result := read_result(train, step)) is not None]


def track_probes(tracker: Tracker, train: Path) -> None:
    """Log all results again: a killed process may have lost the last ones. The tracker skips the points that it already has."""
    results = read_probes(train)
    for result in results:
        _track_scores(tracker, result)
    if results:
        _track_tables(tracker, results[-1], results)


def track_probe(tracker: Tracker, new: ProbeResult, all_results: Sequence[ProbeResult]) -> None:
    """Log the new result's points of the curves, and all results as tables: one of scores, one of answers for each probe."""
    _track_scores(tracker, new)
    _track_tables(tracker, new, all_results)


def _track_scores(tracker: Tracker, result: ProbeResult) -> None:
    tracker.log_behind("probes", {score.probe: score.accuracy for score in result.scores}, result.step)


def _track_tables(tracker: Tracker, new: ProbeResult, all_results: Sequence[ProbeResult]) -> None:
    columns = ["step", "probe", "accuracy", "standard error", "problems", "truncated"]
    rows = [[result.step, *asdict(score).values()] for result in all_results for score in result.scores]
    tracker.table("probe scores", columns, rows)
    for score in new.scores:
        answers = [
            [result.step, sample.problem, sample.answer, sample.extracted, sample.score]
            for result in all_results
            for sample in result.samples
            if sample.probe == score.probe
        ]
        tracker.table(f"probe answers/{score.probe}", ["step", "problem", "answer (its end)", "extracted", "score"], answers)
