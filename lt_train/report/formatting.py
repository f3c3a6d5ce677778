"""Scores as text, for the terminal and the page alike."""

from lt_train.evaluation.scores import AnswerScores, LossScores, Scores, difference
from lt_train.evaluation.statistics import Difference, Interval


def ends(span: Interval | None) -> tuple[float, ...]:
    return () if span is None else (span.low, span.high)


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def difference_from(scores: Scores, base: Scores) -> tuple[str, Difference | None]:
    """The difference with its interval as text, and the difference itself; None: the evaluation was changed between the two."""
    try:
        found = difference(scores, base)
    except ValueError:
        return "not comparable", None
    if isinstance(scores, LossScores):
        return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]", found
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]", found


def problems_and_sampling(scores: AnswerScores) -> str:
    """Problems and sampling, such as "30 of 90 problems, 4 answers each at temperature 0.6"."""
    problems = f"{scores.problems:,}" + (f" of {scores.available:,}" if scores.problems < scores.available else "")
    temperature, plural = scores.fingerprint.get("temperature"), "s" * (scores.samples > 1)
    how = "greedy" if temperature == 0 else f"{scores.samples} answer{plural} each at temperature {temperature}"
    return f"{problems} problems, {how}"
