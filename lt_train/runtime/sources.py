"""Where a model or a data set comes from: a hub id, a local folder or a file, by one name in the recipe."""

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lt_train.runtime.errors import UserError, shortened
from lt_train.runtime.files import read_json_lines

HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")

Row = tuple[str, dict[str, Any]]
"""Where a row is ("traces.jsonl:17"), and its fields."""


def resolve_model(name: str) -> str:
    """The path of an existing local model folder, or `name` itself where it can be a hub id.

    Raises:
        UserError: neither; it says where it looked.
    """
    path = _local(name)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: this folder holds no model: there is no {(path / 'config.json').absolute()}")
        return str(path)
    if os.path.exists(path):
        raise UserError(f"{name}: {path.absolute()} is a file; name the folder that holds config.json and the weights")
    if not _may_be_hub_id(name):
        raise UserError(
            f"{shortened(name)}: there is no folder {shortened(str(path.absolute()))}, and a hub id looks like owner/name"
        )
    return name


def resolve_data(name: str) -> Path | str:
    """The path of an existing local data file or folder, or `name` itself where it can be a hub id.

    Raises:
        UserError: neither, or a file of a kind that is not read; it says where it looked.
    """
    path = _local(name)
    if os.path.isfile(path) and path.suffix not in DATA_SUFFIXES:
        raise UserError(f"{name}: a data file ends in {', '.join(DATA_SUFFIXES)}, not in {path.suffix or 'nothing'}")
    if os.path.exists(path):
        return path
    if not _may_be_hub_id(name) or path.suffix in DATA_SUFFIXES:
        where = shortened(str(path.absolute()), 300)
        raise UserError(f"{shortened(name)}: there is no file or folder {where}, and a hub id looks like owner/name")
    return name


def load_rows(source: str, split: str = "train", limit: int | None = None, subset: str | None = None) -> Iterator[Row]:
    """Rows of a local .jsonl, .json or .parquet file, of a folder of them, or of a hub data set.

    Args:
        split: of a hub data set, or of a folder whose files are named after splits (train.jsonl, test.jsonl).
        limit: only the first so many rows.
        subset: which configuration of a hub data set.

    Raises:
        UserError: nothing there, or not readable; for a row with its file and line.
    """
    resolved = resolve_data(source)
    rows = _local_rows(resolved, split) if isinstance(resolved, Path) else _hub_rows(resolved, split, subset)
    return islice(rows, limit)


def _local(name: str) -> Path:
    """`name` as a path. `~` of an unknown user stays as it is; os.path answers False for a name that no file can have."""
    return Path(os.path.expanduser(name))


def _may_be_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _local_rows(path: Path, split: str) -> Iterator[Row]:
    for file in _files_in(path, split) if path.is_dir() else [path]:
        read = {".jsonl": read_json_lines, ".json": _json_rows, ".parquet": _parquet_rows}[file.suffix]
        yield from read(file)


def _files_in(folder: Path, split: str) -> list[Path]:
    """The data files right in `folder`: all of them, or those of `split` where their names tell splits apart."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in DATA_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no {', '.join(DATA_SUFFIXES)} file lies in {folder.absolute()}")
    splits = [re.split(r"[^a-z]", file.stem.lower())[0] for file in files]
    if not any(name in SPLITS for name in splits):
        return files
    chosen = [file for file, name in zip(files, splits, strict=True) if name == split]
    if not chosen:
        raise UserError(
            f"{folder}: no file of the split {split!r} among {', '.join(file.name for file in files)}; name one of them"
        )
    return chosen


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({error}); if it holds one object a line, call it .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json data file holds a list of objects, this holds a {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a row must be a JSON object, this is a {type(row).__name__}")
        yield f"{path}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
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
        raise UserError(f"{path}: not a whole Parquet file{after} ({_first_line(error)})") from error


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, subset, split=split)
    except Exception as error:  # offline, unknown, gated, corrupt: datasets and its HTTP clients raise dozens of kinds
        raise UserError(
            f"{name}: there is no local file or folder {Path(name).absolute()}, and as a hub data set "
            f"(split {split!r}, subset {subset!r}) it cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name} [{split}], row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
