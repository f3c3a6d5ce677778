"""Samples on disk: one JSON line a sample, appended as it is made, beside a meta.json that identifies how they were made.

A folder holds samples of one model, prompt and sampling. An evaluation with the same fingerprint resumes; opening the folder with
another fingerprint raises UserError, and nothing is overwritten. Several processes may fill one folder: each appends to a file of
its own, and every process reads all files. verdicts.jsonl holds later verdicts on samples, which replace those in their lines.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from lt_train.evaluation.grading.extraction import ExtractedFrom
from lt_train.runtime import files
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import check_same
from lt_train.runtime.run_paths import SAMPLES_META, SCORES

Fingerprint = Mapping[str, str | int | float | None]
"""What decides the content of a sample, by name: the model, the prompt, the sampling, …"""

GRADER_VERSION = 3
"""Of extraction and verdicts. Raise it where the same text may get another verdict; samples of an evaluation that is not scored yet
are then judged again."""


@dataclass(frozen=True)
class Verdict:
    """The grader's result for one sample.

    Attributes:
        extracted: the answer found in the text; None: there is none. extracted_from: where; None also where the whole text is
            the answer.
        score: from 0 (incorrect) to 1 (correct); 0 of a truncated answer to a benchmark whose truncated answers are incorrect.
            correct: whether the score is 1.
        grading_error: why an answer could not be judged (it counts as incorrect).
        graded_score: the score of the text, truncated or not; None: unknown, in records of grader version 1.
        grader: the GRADER_VERSION that made it.
    """

    extracted: str | None
    extracted_from: ExtractedFrom | None
    score: float
    correct: bool
    grading_error: str | None
    graded_score: float | None
    grader: int


@dataclass(frozen=True)
class SampleRecord:
    """One answer to one problem, and its `Verdict`.

    Attributes:
        seed: the sample's own; None when greedy.
        tokens: new tokens, the stop token included. thinking_tokens: those before the reasoning was closed; None: none was.
        seconds: its share of the time in which it shared the model with others.
    """

    problem: str
    sample: int
    seed: int | None
    prompt_hash: str
    text: str
    tokens: int
    thinking_tokens: int | None
    finish_reason: str
    extracted: str | None
    extracted_from: ExtractedFrom | None
    score: float
    correct: bool
    grading_error: str | None
    seconds: float
    graded_score: float | None = None
    grader: int = 1

    @property
    def key(self) -> tuple[str, int]:
        return self.problem, self.sample

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def text_score(self) -> float:
        """The score of the text, truncated or not, as far as it is known."""
        return self.score if self.graded_score is None else self.graded_score

    def with_verdict(self, verdict: Verdict) -> "SampleRecord":
        return replace(self, **asdict(verdict))


VERDICTS = "verdicts.jsonl"
ADDED_FIELDS = {"graded_score", "grader"}
"""Fields that records of grader version 1 lack."""

_RECORD, _VERDICT = TypeAdapter(SampleRecord), TypeAdapter(Verdict)


class RecordFolder:
    """The samples of one evaluation."""

    def __init__(self, folder: Path, fingerprint: Fingerprint, rank: int = 0, world_size: int = 1) -> None:
        """Open a folder, or make it.

        Args:
            rank: this process's number among the `world_size` processes that fill the folder together.

        Raises:
            UserError: it holds results made with another fingerprint, or its meta.json cannot be read.
        """
        self.folder = folder
        self.fingerprint = fingerprint
        self.samples_path = folder / ("samples.jsonl" if world_size == 1 else f"samples-{rank}.jsonl")
        """Where this process, and no other, appends."""
        claim_folder(folder, fingerprint)
        files.drop_cut_line(self.samples_path)

    def read(self) -> dict[tuple[str, int], SampleRecord]:
        """All samples so far, see `read_records`. It fails where another process has claimed the folder for another model since."""
        return read_records(self.folder, self.fingerprint)

    def append(self, record: SampleRecord) -> None:
        """Add a sample, and pass it to the operating system, so that it survives the death of this process.

        Raises:
            UserError: it cannot be written, such as on a full disk; the samples before it are complete.
        """
        self._append(self.samples_path, asdict(record), f"sample {record.sample} of problem {record.problem}")

    def append_verdict(self, record: SampleRecord, verdict: Verdict) -> SampleRecord:
        """Replace the verdict on a sample; call it in one process only. Returns the record with the new verdict.

        Raises:
            UserError: it cannot be written.
        """
        row = {"problem": record.problem, "sample": record.sample, **asdict(verdict)}
        files.drop_cut_line(self.folder / VERDICTS)
        self._append(self.folder / VERDICTS, row, f"the verdict on sample {record.sample} of problem {record.problem}")
        return record.with_verdict(verdict)

    def _append(self, path: Path, row: dict[str, Any], what: str) -> None:
        try:
            append_whole_line(path, (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(
                f"{path}: cannot take {what}: {error.strerror}. The samples before it are safe. Fix: make room (or let this "
                f"process write there) and give the same command again to resume"
            ) from error


class NamesSample(Protocol):
    @property
    def problem(self) -> str: ...

    @property
    def sample(self) -> int: ...


Requested = TypeVar("Requested", bound=NamesSample)


def shard_of(requests: Sequence[Requested], rank: int, world_size: int) -> tuple[Requested, ...]:
    """The requests that one of several processes answers: each belongs to one process, and shard sizes differ by at most one.

    Shards follow from the set of (problem, sample) alone, not from the order of the requests. So give all ranks the same set: the
    whole plan, and leave out afterwards what is there already; ranks that look at the folder at different moments find
    different samples missing. A problem's samples go to different ranks, since they tend to be of similar length.

    Raises:
        ValueError: no such rank, or a request is there twice.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    in_order = sorted((request.problem, request.sample) for request in requests)
    numbers = {key: number for number, key in enumerate(in_order)}
    if len(numbers) < len(requests):
        raise ValueError("the same sample of a problem is requested twice")
    return tuple(request for request in requests if numbers[request.problem, request.sample] % world_size == rank)


def sample_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("samples.jsonl"), *folder.glob("samples-*.jsonl")])


def read_records(folder: Path, fingerprint: Fingerprint) -> dict[tuple[str, int], SampleRecord]:
    """All samples of a folder by (problem, sample), of all processes. A line that is still being written is not among them.

    Reads only: the folder may belong to an evaluation that is running.

    Raises:
        UserError: a line is not a sample, two lines differ on one sample, or the samples were made with another fingerprint.
    """
    records: dict[tuple[str, int], SampleRecord] = {}
    places: dict[tuple[str, int], str] = {}
    paths = sample_files(folder)
    if paths:
        check_same_fingerprint(folder / SAMPLES_META, "samples", fingerprint)
    for path in paths:
        for where, row in files.read_json_lines(path, being_written=True):
            record = parse_record(row, where)
            before = records.setdefault(record.key, record)
            place = places.setdefault(record.key, where)
            if before is not record and content(before) != content(record):
                raise UserError(
                    f"{where}: a second, different sample {record.sample} of problem {record.problem}; the first is {place}. "
                    f"Two processes drew it, or a file was edited. Fix: remove one of the two lines, or delete the folder to draw "
                    f"all samples again"
                )
    for key, verdict in read_verdicts(folder / VERDICTS):
        if key in records:
            records[key] = records[key].with_verdict(verdict)
    return records


def read_verdicts(path: Path) -> list[tuple[tuple[str, int], Verdict]]:
    """
    Raises:
        UserError: a line is not a verdict.
    """
    if not path.exists():
        return []
    found = []
    for where, row in files.read_json_lines(path, being_written=True):
        try:
            key = str(row.pop("problem")), int(row.pop("sample"))
            found.append((key, _VERDICT.validate_python(row)))
        except (KeyError, TypeError, ValueError) as error:  # a ValidationError is a ValueError
            raise UserError(f"{where}: not a complete verdict. Fix: delete {path} to judge its samples again") from error
    return found


def append_whole_line(path: Path, line: bytes) -> None:
    """Append all of a line or nothing.

    Raises:
        OSError: as the operating system reports it; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(line):  # a disk that is nearly full takes a part, and reports it at the next write
                written += file.write(line[written:])
        except BaseException:
            file.truncate(size)
            raise


def claim_folder(folder: Path, fingerprint: Fingerprint) -> None:
    meta_path = folder / SAMPLES_META
    there = sample_files(folder)
    if not there:
        files.write_json(meta_path, {"fingerprint": dict(fingerprint)})
    elif meta_path.exists():
        check_same_fingerprint(meta_path, "samples", fingerprint)
    else:
        raise UserError(
            f"{there[0]}: samples without the meta.json that identifies their model. Fix: move this folder away, or delete it to "
            f"draw the samples again"
        )


def recorded_model(folder: Path) -> str | None:
    """Fingerprint of the model that made the samples or the scores in a folder; None where the folder has none."""
    for name in (SAMPLES_META, SCORES):
        if (folder / name).is_file():
            found = files.read_json(folder / name, "record of an evaluation")
            fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
            return fingerprint.get("model") if isinstance(fingerprint, dict) else None
    return None


def check_same_fingerprint(path: Path, what: str, fingerprint: Fingerprint) -> None:
    """
    Raises:
        UserError: the JSON file at `path` was made with another fingerprint; the message lists the differences.
    """
    found = files.read_json(path, f"record of how {what} were made")
    there = found.get("fingerprint") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        raise UserError(f"{path}: lacks the fingerprint of its {what}. Fix: delete this folder to make them again")
    fix = "give this evaluation another `name`, or move the folder away"
    if there.get("instruction") != fingerprint.get("instruction"):
        fix += "; or set `instruction` to the one there ('' for none)"
    check_same(there, fingerprint, f"{path.parent}: holds {what} made in another way", f"{fix}. Nothing was changed")


def parse_record(row: dict[str, Any], where: str) -> SampleRecord:
    names = {field.name for field in fields(SampleRecord)}
    if faulty := (row.keys() ^ names) - (ADDED_FIELDS - row.keys()):
        listed = ", ".join(sorted(faulty))
        raise UserError(
            f"{where}: not a sample of this version of lt_train (missing or unknown: {listed}). Fix: move the folder away"
        )
    try:
        return _RECORD.validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: not a complete sample ({name}: {first['msg']}). Fix: remove the line and run again to draw it again"
        ) from error


def content(record: SampleRecord) -> dict[str, Any]:
    """The fields in which two records of one sample must agree: all except the time it took."""
    return {name: value for name, value in asdict(record).items() if name != "seconds"}
