"""The samples of an evaluation: read, and put into the form in which a page holds thousands of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lt_train.evaluation.records import SampleRecord, read_records, sample_files
from lt_train.evaluation.scores import AnswerScores
from lt_train.recipe.reasoning_tags import REASONING_ENDS, REASONING_TAGS
from lt_train.runtime.errors import UserError

MAX_CHARACTERS = 100_000
"""Of one trace: so much is shown whole, whatever else the page holds."""

MAX_TOTAL_CHARACTERS = 48_000_000
"""Of all traces together: more than this takes a browser on a phone seconds to open."""


def read_samples(folder: Path, scores: AnswerScores) -> tuple[SampleRecord, ...]:
    """The samples that `scores` count, in the order of its problems; none where the folder holds no samples at all.

    Reads only: the folder may belong to an evaluation that is running.

    Raises:
        UserError: samples were made otherwise than the scores, some are missing, or a line is damaged.
    """
    if not sample_files(folder):
        return ()
    records = read_records(folder, scores.fingerprint)
    wanted = [(problem, sample) for problem in scores.by_problem for sample in range(scores.samples)]
    missing = [key for key in wanted if key not in records]
    if missing and not scores.partial:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(wanted)} samples that its scores.json counts are not there, such as sample "
            f"{missing[0][1]} of problem {missing[0][0]}. Delete scores.json and run again to draw them anew"
        )
    return tuple(records[key] for key in wanted if key in records)


@dataclass(frozen=True)
class Trace:
    """A text in two parts: what folds away, and what follows it. Either may be empty."""

    thought: str
    answer: str


def split_trace(text: str) -> Trace:
    """Everything up to the last mark that ends a thought folds away; all of a thought that was begun and not ended does, too."""
    end = max((at + len(mark) for mark in REASONING_ENDS if (at := text.rfind(mark)) >= 0), default=0)
    if end == 0 and text.lstrip().startswith(tuple(tags.opening for tags in REASONING_TAGS)):
        end = len(text)
    return Trace(text[:end], text[end:])


def character_limit(lengths: Iterable[int], most: int = MAX_CHARACTERS, total: int = MAX_TOTAL_CHARACTERS) -> int:
    """The greatest limit of one trace, up to `most`, at which all traces of these lengths stay within `total`."""
    left = total
    ascending = sorted(lengths)
    for done, length in enumerate(ascending):
        share = left // (len(ascending) - done)
        if length > share:
            return min(most, share)
        left -= length
    return most


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters (and a line that says what is left out), its first and its last half."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]}\n\n[… {len(text) - limit:,} characters left out …]\n\n{text[len(text) - tail :]}"


def parts(record: SampleRecord, limit: int) -> Sequence[str]:
    """Thought and answer for the page; where both do not fit, the thought gives way, since the answer is short and was judged."""
    trace = split_trace(record.text)
    answer = shortened(trace.answer, limit)
    return shortened(trace.thought, max(0, limit - len(trace.answer))), answer
