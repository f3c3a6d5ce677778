"""Sources of models and data sets: a hub id, a local folder or a file, by one name in the recipe."""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lt_train.runtime.data_files import SUFFIXES, PlacedRow, data_suffix, file_rows, first_line
from lt_train.runtime.data_folders import folder_rows
from lt_train.runtime.errors import UserError, shortened

HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")

LONGEST_HUB_ID = 96

Row = tuple[str, dict[str, Any]]
"""The place of a row ("traces.jsonl:17"), and its fields."""


def resolve_model(name: str) -> str:
    """The path of an existing local model folder, or `name` itself where it can be a hub id.

    Raises:
        UserError: neither, or a folder with an adapter; the message has the path that was tried.
    """
    path = _local(name)
    if os.path.isdir(path):
        if (path / "adapter_config.json").is_file():
            beside = " beside a model, to which transformers would add it" if (path / "config.json").is_file() else ", no model"
            raise UserError(
                f"{name}: this folder holds an adapter (adapter_config.json){beside}. "
                "Fix: name a folder that holds a model alone: of PEFT, what merge_and_unload().save_pretrained writes"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: this folder holds no model: there is no {(path / 'config.json').absolute()}")
        return str(path)
    if os.path.exists(path):
        raise UserError(f"{name}: {path.absolute()} is a file; name the folder that holds config.json and the weights")
    if not _may_be_hub_id(name):
        where = shortened(str(path.absolute()), 300)
        raise UserError(f"{shortened(name)}: there is no folder {where}, and a hub id looks like owner/name")
    return name


def resolve_data(name: str) -> Path | str:
    """The path of an existing local data file or folder, or `name` itself where it can be a hub id.

    Raises:
        UserError: neither, or a file of a kind that is not read; the message has the path that was tried.
    """
    path = _local(name)
    if os.path.exists(path) and not os.path.isdir(path) and data_suffix(path) is None:
        raise UserError(f"{name}: a data file ends in {', '.join(SUFFIXES)}, not in {path.suffix or 'nothing'}")
    if os.path.exists(path):
        return path
    if not _may_be_hub_id(name) or data_suffix(path) is not None:
        where = shortened(str(path.absolute()), 300)
        raise UserError(f"{shortened(name)}: there is no file or folder {where}, and a hub id looks like owner/name")
    return name


def load_rows(source: str, split: str = "train", limit: int | None = None, subset: str | None = None) -> Iterator[Row]:
    """As `read_rows`, where every row must be readable.

    Raises:
        UserError: nothing there, or not readable; for a row with its file and line.
    """
    for where, row in read_rows(source, split, limit, subset):
        if isinstance(row, str):
            raise UserError(f"{where}: {row}")
        yield where, row


def read_rows(source: str, split: str = "train", limit: int | None = None, subset: str | None = None) -> Iterator[PlacedRow]:
    """Rows of a local data file, of a folder of them, or of a hub data set; of a damaged row the fault.

    Args:
        split: of a hub data set, or of a folder whose files are named after splits (train.jsonl, test.jsonl).
        limit: the number of rows, from the first.
        subset: which configuration of a hub data set, or which folder in a folder.

    Raises:
        UserError: nothing there, or not readable.
    """
    resolved = resolve_data(source)
    if isinstance(resolved, str):
        rows = _hub_rows(resolved, split, subset)
    else:
        rows = folder_rows(resolved, split, subset) if resolved.is_dir() else file_rows(resolved)
    return islice(rows, limit)


def _local(name: str) -> Path:
    """`name` as a path. `~` of an unknown user stays as it is; os.path answers False for a name that no file can have."""
    return Path(os.path.expanduser(name))


def _may_be_hub_id(name: str) -> bool:
    return len(name) <= LONGEST_HUB_ID and HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[PlacedRow]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, subset, split=split)
    except Exception as error:  # offline, unknown, gated, corrupt: datasets and its HTTP clients raise dozens of kinds
        raise UserError(
            f"{name}: there is no local file or folder {Path(name).absolute()}, and as a hub data set "
            f"(split {split!r}, subset {subset!r}) it cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name} [{split}], row {number}", row
