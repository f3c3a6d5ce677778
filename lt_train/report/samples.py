"""The samples of an evaluation, and the form in which a page holds thousands of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lt_train.evaluation.grading.extraction import end_of_reasoning
from lt_train.evaluation.records import SampleRecord, read_records, sample_files
from lt_train.evaluation.scores import AnswerScores
from lt_train.recipe.reasoning_tags import REASONING_TAGS
from lt_train.runtime.errors import UserError

MAX_CHARACTERS = 100_000
"""Of one trace: a trace up to this length is complete, whatever else the page holds."""

MAX_TOTAL_CHARACTERS = 48_000_000
"""Of all traces together: a browser on a phone takes seconds to open more than this."""


def read_samples(folder: Path, scores: AnswerScores) -> tuple[SampleRecord, ...]:
    """The samples that `scores` count, in the order of its problems; none where the folder holds no samples at all.

    Reads only: the folder may belong to an evaluation that is running.

    Raises:
        UserError: samples and scores have different fingerprints, some samples are missing, or a line is damaged.
    """
    if not sample_files(folder):
        return ()
    records = read_records(folder, scores.fingerprint)
    wanted = [(problem, sample) for problem in scores.by_problem for sample in range(scores.samples)]
    missing = [key for key in wanted if key not in records]
    if missing and not scores.partial:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(wanted)} samples that its scores.json counts are not there, such as sample "
            f"{missing[0][1]} of problem {missing[0][0]}. Fix: delete scores.json and run again, which draws them again"
        )
    return tuple(records[key] for key in wanted if key in records)


@dataclass(frozen=True)
class Trace:
    """A text in two parts, the reasoning and what follows it. Either may be empty."""

    reasoning: str
    answer: str


def split_trace(text: str) -> Trace:
    """Everything up to the last closing tag is reasoning; so is all of a text that opens with a tag and never closes it."""
    end = end_of_reasoning(text)
    if end == 0 and text.lstrip().startswith(tuple(tags.opening for tags in REASONING_TAGS)):
        end = len(text)
    return Trace(text[:end], text[end:])


def character_limit(lengths: Iterable[int], most: int = MAX_CHARACTERS, total: int = MAX_TOTAL_CHARACTERS) -> int:
    """The greatest limit of one trace, up to `most`, at which all traces of these lengths stay within `total` characters."""
    left = total
    ascending = sorted(lengths)
    for done, length in enumerate(ascending):
        each = left // (len(ascending) - done)
        if length > each:
            return min(most, each)
        left -= length
    return most


def shortened(text: str, limit: int) -> str:
    """The first and the last half of `limit` characters, and between them a line with the number that is left out."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]}\n\n[… {len(text) - limit:,} characters left out …]\n\n{text[len(text) - tail :]}"


def parts(record: SampleRecord, limit: int) -> Sequence[str]:
    """Reasoning and answer for the page; where both do not fit, the reasoning is shortened first: the answer was graded."""
    trace = split_trace(record.text)
    answer = shortened(trace.answer, limit)
    return shortened(trace.reasoning, max(0, limit - len(trace.answer))), answer
