"""Rows of data files: JSON Lines, JSON, CSV, Parquet and Arrow, gzipped or not, each row with its place."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from lt_train.runtime.errors import UserError, kind_of
from lt_train.runtime.files import json_row

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Kinds of data files, by how their names end; all but the last two also with .gz behind."""

PlacedRow = tuple[str, dict[str, Any] | str]
"""Where a row is ("traces.jsonl:17"), and its fields, or the fault in it."""

_BOM = b"\xef\xbb\xbf"
_LFS_POINTER = b"version https://git-lfs"


def data_suffix(path: Path) -> str | None:
    """The kind of a data file, in small letters and without .gz; None where it is none."""
    name = path.name.lower().removesuffix(".gz")
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if kind in (".parquet", ".arrow") and path.name.lower().endswith(".gz") else kind


def file_rows(path: Path) -> Iterator[PlacedRow]:
    """
    Raises:
        UserError: the file cannot be read, or is damaged so that its rows cannot be separated.
    """
    kind = data_suffix(path)
    assert kind is not None, f"{path} is no data file"
    try:
        with _opened(path) as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{path}: a Git LFS pointer, not the data. Fix: download the file itself (git lfs pull)")
        yield from {
            ".jsonl": _json_lines,
            ".ndjson": _json_lines,
            ".json": _json,
            ".csv": _csv,
            ".tsv": _csv,
            ".parquet": _parquet,
            ".arrow": _arrow,
        }[kind](path)
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb"))


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                try:
                    yield f"{path}:{number}", json_row(line)
                except ValueError as error:
                    yield f"{path}:{number}", str(error)


def _json(path: Path) -> Iterator[PlacedRow]:
    with _opened(path) as file:
        content = file.read()
    try:
        rows = json.loads(content.removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise UserError(f"{path}: not JSON ({error}); if it holds one object a line, call it .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json data file holds a list of objects, this holds {kind_of(rows)}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, row if isinstance(row, dict) else f"a row must be a JSON object, this is {kind_of(row)}"


def _csv(path: Path) -> Iterator[PlacedRow]:
    """Every value is text, as in the file; a row's place is the line that it begins on."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default; traces are longer
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if data_suffix(path) == ".tsv" else ",", strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"{path}: two columns have one name: {', '.join(names)}")
            line = reader.line_num + 1
            for values in reader:
                if values:
                    fits = len(values) == len(names)
                    problem = f"the row has {len(values)} fields, the header {len(names)}"
                    yield f"{path}:{line}", dict(zip(names, values, strict=True)) if fits else problem
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV in UTF-8 ({error})") from error


def _parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{path}: not a complete Parquet file{after} ({first_line(error)})") from error


def _arrow(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    from datasets import Dataset

    try:
        dataset = Dataset.from_file(str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a complete Arrow file ({first_line(error)})") from error
    for number, row in enumerate(dataset, start=1):
        yield f"{path}, row {number}", row


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
