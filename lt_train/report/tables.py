"""The table of an evaluation: its variants, a row each, every score with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

from lt_train.evaluation.scores import AnswerScores, LossScores, Scores
from lt_train.evaluation.statistics import Difference
from lt_train.hybrid.kv_size import KV_TOKENS
from lt_train.recipe.evaluations import BASE
from lt_train.report.charts import colour
from lt_train.report.contents import EvaluatedVariant
from lt_train.report.formatting import difference_from, ends, percent, problems_and_sampling
from lt_train.runtime.units import format_bytes


@dataclass(frozen=True)
class IntervalDrawing:
    """Score and interval on a scale that the table's rows share; places in per cent of its width."""

    text: str
    point: float
    interval: tuple[float, float] | None
    base: float | None


@dataclass(frozen=True)
class Row:
    run: str
    label: str
    colour: str
    score: str
    interval: str
    drawing: IntervalDrawing
    difference: str
    test: str
    """The difference's p value; empty where no test was made."""
    tendency: str
    """better | worse: the interval of the difference is on one side of 0; otherwise empty."""
    cells: tuple[str, ...]


@dataclass(frozen=True)
class ResultTable:
    """`columns`: name and explanation of each."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    several_runs: bool


def result_table(rows: Sequence[EvaluatedVariant], several_runs: bool) -> ResultTable:
    """The table of one evaluation's variants."""
    first = rows[0].result.scores
    generated = isinstance(first, AnswerScores)
    votes = generated and any(each.result.scores.samples > 1 for each in rows)
    span = shared_scale(rows)
    return ResultTable(
        columns=columns(first, votes),
        rows=tuple(table_row(each, span, votes) for each in rows),
        notes=tuple(notes(rows, several_runs)),
        several_runs=several_runs,
    )


def columns(scores: Scores, votes: bool) -> tuple[tuple[str, str], ...]:
    generated = isinstance(scores, AnswerScores)
    if isinstance(scores, AnswerScores):
        first = (
            "accuracy, % ± SE",
            "mean over problems and its standard error; none where all problems scored the same",
        )
    elif scores.is_divergence:
        first = ("nats per token ± SE", "KL(base || model) of the next token, mean over held-out answer tokens; 0: the base itself")
    else:
        first = ("nats per token ± SE", "held-out loss: mean negative log-likelihood of an answer token; the less, the better")
    kv = (f"KV at {KV_TOKENS // 1024}K", f"KV cache of one sequence of {KV_TOKENS:,} tokens, in the dtype of the base's weights")
    shared = (
        first,
        (
            "95 % interval",
            "accuracy: Wilson's where every problem is correct or incorrect, or all scored the same, else a bootstrap over "
            "problems; loss: Student's t over samples",
        ),
        (
            "minus base",
            "difference from the base of the same run, paired by problem, with its 95 % interval; hover for its p value",
        ),
    )
    if not generated:
        return (*shared, kv)
    return (
        *shared,
        *(VOTES if votes else ()),
        ("truncated, %", "fraction of samples that reached max_new_tokens"),
        ("no answer, %", "fraction of samples in which no answer was found"),
        ("tokens per answer", "mean number of new tokens of a sample"),
        ("tokens per s", "new tokens per second of generation; depends on machine, batch size and length"),
        kv,
    )


VOTES = (
    ("majority, %", "maj@k: fraction of problems whose most frequent answer is correct"),
    ("pass@k, %", "fraction of problems with a correct answer among k samples (arXiv 2107.03374); k is the number of samples"),
)


def table_row(each: EvaluatedVariant, span: tuple[float, float], votes: bool) -> Row:
    scores, result = each.result.scores, each.result
    text, test, tendency = compared(each)
    kv = f"{format_bytes(result.kv_bytes)}"
    if isinstance(scores, AnswerScores):
        cells = (
            *((percent(scores.majority), pass_text(scores)) if votes else ()),
            percent(scores.truncated),
            percent(scores.unanswered),
            f"{scores.tokens_per_sample:,.0f}",
            f"{scores.tokens_per_second:,.0f}",
            kv,
        )
    else:
        cells = (kv,)
    return Row(
        run=each.run,
        label=each.result.label,
        colour=colour(result.variant),
        score=score_text(scores),
        interval=interval_text(scores),
        drawing=interval_drawing(each, span),
        difference=text,
        test=test,
        tendency=tendency,
        cells=cells,
    )


def score_text(scores: Scores) -> str:
    if isinstance(scores, LossScores):
        return scores.text
    error = scores.standard_error
    return percent(scores.accuracy) + (f" ± {percent(error)}" if error else "")


def pass_text(scores: AnswerScores) -> str:
    if not scores.pass_at:
        return "–"
    most = max(scores.pass_at)
    return f"{percent(scores.pass_at[most].value)} (k = {most})"


def interval_text(scores: Scores) -> str:
    span = scores.interval
    if span is None:
        return "–"
    if isinstance(scores, LossScores):
        return f"{span.low:.{scores.digits}f} to {span.high:.{scores.digits}f}"
    return f"{percent(span.low)} to {percent(span.high)}"


def compared(each: EvaluatedVariant) -> tuple[str, str, str]:
    """The difference from the base, its test, and its tendency where 0 is outside the interval."""
    if each.result.variant == BASE or each.base is None:
        return "–", "", ""
    text, found = difference_from(each.result.scores, each.base)
    if found is None:
        return text, "", ""
    test = "" if found.p is None or found.test is None else f"p = {found.p:.2g} ({TESTS[found.test]}, {found.n:,} problems)"
    return text, test, tendency(found, less_is_better=isinstance(each.result.scores, LossScores))


TESTS = {"mcnemar": "McNemar's exact test", "permutation": "paired permutation test"}


def tendency(found: Difference, less_is_better: bool) -> str:
    if found.low > 0:
        return "worse" if less_is_better else "better"
    if found.high < 0:
        return "better" if less_is_better else "worse"
    return ""


def shared_scale(rows: Sequence[EvaluatedVariant]) -> tuple[float, float]:
    values = [value for each in rows for value in (each.result.scores.mean.value, *ends(each.result.scores.interval))]
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def interval_drawing(each: EvaluatedVariant, scale: tuple[float, float]) -> IntervalDrawing:
    def place(value: float) -> float:
        return round(6 + 88 * (value - scale[0]) / (scale[1] - scale[0]), 2)

    scores = each.result.scores
    return IntervalDrawing(
        text=f"{score_text(scores)}, 95 % interval {interval_text(scores)}",
        point=place(scores.mean.value),
        interval=None if scores.interval is None else (place(scores.interval.low), place(scores.interval.high)),
        base=None if each.base is None else place(each.base.mean.value),
    )


def notes(rows: Sequence[EvaluatedVariant], several_runs: bool) -> list[str]:
    """Problems and sampling, once where all runs have the same; and the caveats of each row."""
    described = [(each.run, describe(each.result.scores)) for each in rows]
    texts = list(dict.fromkeys(text for _, text in described))
    if len(texts) == 1:
        found = [f"{texts[0]}."]
    elif len(set(described)) > len(dict(described)):  # an evaluation that was changed before all variants had it
        found = [f"{_name(each, several_runs)}: {text}." for each, (_, text) in zip(rows, described, strict=True)]
        found.append("Problems or sampling differ: compare rows that are alike.")
    else:
        found = [f"{run}: {text}." for run, text in dict(described).items()]
        found.append("Problems or sampling differ between the runs: compare within a run.")
    if several_runs and len(texts) == 1 and len({each.result.scores.fingerprint.get("problems") for each in rows}) > 1:
        found.append("The runs have different problems: compare within a run.")
    found += [caveat for each in rows for caveat in caveats(each, several_runs)]
    return found


def _name(each: EvaluatedVariant, several_runs: bool) -> str:
    return f"{each.run}, {each.result.label}" if several_runs else each.result.label


def describe(scores: Scores) -> str:
    if isinstance(scores, LossScores):
        return f"{scores.samples:,} held-out samples, {scores.tokens:,} answer tokens"
    most = scores.fingerprint.get("max_new_tokens")
    limit = f", at most {most:,} new tokens" if isinstance(most, int) else ""
    return f"{scores.benchmark}: {problems_and_sampling(scores)}{limit}; {scores.truncated_text}"


def caveats(each: EvaluatedVariant, several_runs: bool) -> list[str]:
    scores, found = each.result.scores, []
    if isinstance(scores, AnswerScores):
        who = _name(each, several_runs)
        if scores.partial:
            found.append(
                f"{who}: {scores.missing:,} samples are missing. Short answers are done first, so this score is biased towards "
                "problems with short answers."
            )
        accuracies = scores.accuracy_by_truncated_as
        if len({mean.value for mean in accuracies.values()}) > 1:
            listed = ", ".join(f"{percent(mean.value)} % with truncated answers {way}" for way, mean in accuracies.items())
            found.append(f"{who}: accuracy {listed}.")
        if scores.grading_errors:
            found.append(f"{who}: {scores.grading_errors:,} answers could not be graded and count as incorrect.")
        if scores.ties:
            found.append(f"{who}: {scores.ties:,} votes were tied; each counts as the fraction of correct answers among the tied.")
    return found
