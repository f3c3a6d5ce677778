"""Samples on disk: one JSON line a sample, appended as it is made, beside a meta.json that says with what they were
made.

A folder holds samples of one model, prompt and sampling. Whoever comes back with the same goes on where it stopped;
whoever comes with another is turned away, and nothing is overwritten.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lt_train import files
from lt_train.errors import UserError

Fingerprint = Mapping[str, str | int | float | None]
"""What decides the content of a sample, by name: the model, the prompt, the sampling, …"""


@dataclass(frozen=True)
class SampleRecord:
    """One answer to one problem.

    seed: the sample's own; None when greedy. tokens: new tokens, the stop token included. seconds: its share of its
    batch's time.
    extracted: the answer found in the text; None: there is none. grading_error: why an answer could not be judged (it
    counts as wrong).
    """

    problem: str
    sample: int
    seed: int | None
    prompt_hash: str
    text: str
    tokens: int
    finish_reason: str
    extracted: str | None
    correct: bool
    grading_error: str | None
    seconds: float

    @property
    def key(self) -> tuple[str, int]:
        return self.problem, self.sample


class RecordFolder:
    """The samples of one evaluation."""

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        """Open a folder, or make it.

        Raises:
            UserError: it holds results made with another fingerprint, or its meta.json cannot be read.
        """
        self.samples_path = folder / "samples.jsonl"
        claim_folder(folder, self.samples_path, fingerprint)
        files.drop_cut_line(self.samples_path)

    def read(self) -> dict[tuple[str, int], SampleRecord]:
        """All samples by (problem, sample).

        Raises:
            UserError: a line is not a sample, or two lines tell different things of one sample.
        """
        records: dict[tuple[str, int], SampleRecord] = {}
        if not self.samples_path.exists():
            return records
        for where, row in files.read_json_lines(self.samples_path):
            record = parse_record(row, where)
            before = records.setdefault(record.key, record)
            if before is not record and content(before) != content(record):
                raise UserError(
                    f"{where}: a second, different sample {record.sample} of problem {record.problem}. Two processes "
                    f"wrote into this "
                    f"folder, or the file was edited: remove one of the two lines, or delete the folder to make all "
                    f"samples anew"
                )
        return records

    def append(self, record: SampleRecord) -> None:
        files.append_json_line(self.samples_path, asdict(record))


def claim_folder(folder: Path, samples_path: Path, fingerprint: Fingerprint) -> None:
    meta_path = folder / "meta.json"
    if not samples_path.exists():
        files.write_json(meta_path, {"fingerprint": dict(fingerprint)})
    elif meta_path.exists():
        check_same_fingerprint(meta_path, "samples", fingerprint)
    else:
        raise UserError(
            f"{samples_path}: samples without the meta.json that says which model made them. Move this folder away, or "
            f"delete it to make the samples anew"
        )


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
    return SampleRecord(**row)


def content(record: SampleRecord) -> dict[str, Any]:
    """What two records of one sample must agree in: all but the time it took."""
    return {name: value for name, value in asdict(record).items() if name != "seconds"}
