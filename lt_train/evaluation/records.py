"""Samples on disk: one JSON line a sample, appended as it is made, beside a meta.json that says with what they were
made.

A folder holds samples of one model, prompt and sampling. Whoever comes back with the same goes on where it stopped;
whoever comes with another is turned away, and nothing is overwritten. Several processes may fill one folder: each
appends to a file of its own, and whoever reads reads all of them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from lt_train.evaluation.grading.extraction import ExtractedFrom
from lt_train.runtime import files
from lt_train.runtime.errors import UserError

Fingerprint = Mapping[str, str | int | float | None]
"""What decides the content of a sample, by name: the model, the prompt, the sampling, …"""


@dataclass(frozen=True)
class SampleRecord:
    """One answer to one problem.

    Attributes:
        seed: the sample's own; None when greedy.
        tokens: new tokens, the stop token included. thinking_tokens: those before the thought was closed; None: none was.
        extracted: the answer found in the text; None: there is none. extracted_from: where; None also where the whole text is
            the answer.
        score: from 0 (wrong) to 1 (right). correct: whether it counts as right, where only that is counted.
        grading_error: why an answer could not be judged (it counts as wrong).
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

    @property
    def key(self) -> tuple[str, int]:
        return self.problem, self.sample


_AS_DECLARED = TypeAdapter(SampleRecord)


class RecordFolder:
    """The samples of one evaluation."""

    def __init__(self, folder: Path, fingerprint: Fingerprint, rank: int = 0, ranks: int = 1) -> None:
        """Open a folder, or make it.

        Args:
            rank: this process's number among the `ranks` that fill the folder together.

        Raises:
            UserError: it holds results made with another fingerprint, or its meta.json cannot be read.
        """
        self.folder = folder
        self.fingerprint = fingerprint
        self.samples_path = folder / ("samples.jsonl" if ranks == 1 else f"samples-{rank}.jsonl")
        """Where this process appends; nobody else does."""
        claim_folder(folder, fingerprint)
        files.drop_cut_line(self.samples_path)

    def read(self) -> dict[tuple[str, int], SampleRecord]:
        """All samples so far, see `read_records`. It fails where somebody else has meanwhile taken the folder for another model."""
        return read_records(self.folder, self.fingerprint)

    def append(self, record: SampleRecord) -> None:
        """Add a sample, and hand it to the operating system, so that it survives the death of this process.

        Raises:
            UserError: it cannot be written, such as for a full disk; the samples before it are whole.
        """
        try:
            append_whole_line(self.samples_path, (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(
                f"{self.samples_path}: cannot take sample {record.sample} of problem {record.problem}: {error.strerror}. The "
                f"samples before it are safe: make room (or let this process write there) and give the same command again to go on"
            ) from error


class NamesSample(Protocol):
    @property
    def problem(self) -> str: ...

    @property
    def sample(self) -> int: ...


Asked = TypeVar("Asked", bound=NamesSample)


def shard_of(requests: Sequence[Asked], rank: int, ranks: int) -> tuple[Asked, ...]:
    """What one of several processes is to draw: every sample belongs to one of them, and no two shares differ by more than one.

    It follows from the set of (problem, sample) alone, not from the order of the requests. So give all ranks the same set: the
    whole plan, and leave out afterwards what is there already; ranks that look at the folder at different moments find
    different samples missing. A problem's samples go to different ranks, since they tend to be of similar length.

    Raises:
        ValueError: no such rank, or a request is there twice.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    in_order = sorted((request.problem, request.sample) for request in requests)
    numbers = {key: number for number, key in enumerate(in_order)}
    if len(numbers) < len(requests):
        raise ValueError("the same sample of a problem is asked for twice")
    return tuple(request for request in requests if numbers[request.problem, request.sample] % ranks == rank)


def sample_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("samples.jsonl"), *folder.glob("samples-*.jsonl")])


def read_records(folder: Path, fingerprint: Fingerprint) -> dict[tuple[str, int], SampleRecord]:
    """All samples of a folder by (problem, sample), whoever made them. What a process is just writing is not among them.

    Reads only: the folder may belong to an evaluation that is running.

    Raises:
        UserError: a line is not a sample, two lines tell different things of one sample, or the samples were made with another
            fingerprint.
    """
    records: dict[tuple[str, int], SampleRecord] = {}
    places: dict[tuple[str, int], str] = {}
    paths = sample_files(folder)
    if paths:
        check_same_fingerprint(folder / "meta.json", "samples", fingerprint)
    for path in paths:
        for where, row in files.read_json_lines(path, being_written=True):
            record = parse_record(row, where)
            before = records.setdefault(record.key, record)
            place = places.setdefault(record.key, where)
            if before is not record and content(before) != content(record):
                raise UserError(
                    f"{where}: a second, different sample {record.sample} of problem {record.problem}; the first is {place}. "
                    f"Two processes drew it, or a file was edited: remove one of the two lines, or delete the folder to make "
                    f"all samples anew"
                )
    return records


def append_whole_line(path: Path, line: bytes) -> None:
    """Append all of a line or nothing.

    Raises:
        OSError: as the operating system says; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(line):  # a disk that is nearly full takes a part, and says so at the next write
                written += file.write(line[written:])
        except BaseException:
            file.truncate(size)
            raise


def claim_folder(folder: Path, fingerprint: Fingerprint) -> None:
    meta_path = folder / "meta.json"
    there = sample_files(folder)
    if not there:
        files.write_json(meta_path, {"fingerprint": dict(fingerprint)})
    elif meta_path.exists():
        check_same_fingerprint(meta_path, "samples", fingerprint)
    else:
        raise UserError(
            f"{there[0]}: samples without the meta.json that says which model made them. Move this folder away, or "
            f"delete it to make the samples anew"
        )


def recorded_model(folder: Path) -> str | None:
    """Fingerprint of the model that made the samples or the scores in a folder; None where it does not say."""
    for name in ("meta.json", "scores.json"):
        if (folder / name).is_file():
            found = files.read_json(folder / name, "record of an evaluation")
            fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
            return fingerprint.get("model") if isinstance(fingerprint, dict) else None
    return None


def check_same_fingerprint(path: Path, what: str, fingerprint: Fingerprint) -> None:
    """
    Raises:
        UserError: the JSON file at `path` was made with another fingerprint; the message says in what they differ.
    """
    found = files.read_json(path, f"record of how {what} were made")
    there = found.get("fingerprint") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        raise UserError(f"{path}: does not say how the {what} were made. Delete this folder to make them anew")
    names = [*fingerprint, *(name for name in there if name not in fingerprint)]
    differing = [name for name in names if there.get(name) != fingerprint.get(name)]
    if differing:
        listed = "\n".join(f"  {name}: {there.get(name)!r} there, {fingerprint.get(name)!r} now" for name in differing)
        raise UserError(
            f"{path.parent}: holds {what} made in another way:\n{listed}\n  Give this evaluation another `name`, or "
            f"move the folder "
            f"away; nothing in it was changed"
        )


def parse_record(row: dict[str, Any], where: str) -> SampleRecord:
    names = {field.name for field in fields(SampleRecord)}
    if row.keys() != names:
        wrong = ", ".join(sorted(row.keys() ^ names))
        raise UserError(f"{where}: not a sample of this version of lt_train (missing or unknown: {wrong}). Move the folder away")
    try:
        return _AS_DECLARED.validate_python(row)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{where}: not a whole sample ({name}: {fault['msg']}). Remove the line and run again to make it anew"
        ) from error


def content(record: SampleRecord) -> dict[str, Any]:
    """What two records of one sample must agree in: all but the time it took."""
    return {name: value for name, value in asdict(record).items() if name != "seconds"}
