"""The data files of a folder: a downloaded data set of the hub, or a user's own files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lt_train.runtime.data_files import SUFFIXES, PlacedRow, data_suffix, file_rows, first_line
from lt_train.runtime.errors import UserError

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Words in names of files and folders that name a split."""

NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data."""


def folder_rows(folder: Path, split: str, subset: str | None) -> Iterator[PlacedRow]:
    """
    Raises:
        UserError: no data in it, no such split or subset, or several subsets.
    """
    if is_saved_dataset(folder):
        yield from _saved_rows(folder, split)
        return
    for file in files_in(folder, split, subset):
        yield from file_rows(file)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or DatasetDict wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def files_in(folder: Path, split: str, subset: str | None) -> list[Path]:
    """The data files of a split and a subset: as the folder's README.md declares them, else as names of files and folders show."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and data_suffix(path) and path.name not in NOT_DATA and not _is_hidden(path.relative_to(folder))
    ]
    if not files:
        raise UserError(f"{folder}: there is no {', '.join(SUFFIXES)} file in {folder.absolute()}")
    configs = _declared_configs(folder)
    if configs:
        files, splits = _declared_files(folder, configs, files, subset)
    else:
        files = _of_subset(folder, files, subset)
        splits = [_split_of(file.relative_to(folder)) for file in files]
    if not any(splits):
        return files
    chosen = [file for file, name in zip(files, splits, strict=True) if name == split]
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise UserError(f"{folder}: no file of the split {split!r} among {names}; name one of them")
    return chosen


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that is named by a file, else by the nearest folder."""
    for name in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in SPLITS:
                return word
    return None


def _of_subset(folder: Path, files: list[Path], subset: str | None) -> list[Path]:
    """The files in the folder of a subset. Folders at the top that are named after no split are subsets of their own."""
    tops = {file: file.relative_to(folder).parts[0] for file in files if len(file.relative_to(folder).parts) > 1}
    subsets = sorted({top for top in tops.values() if _split_of(Path(top)) is None})
    if subset is not None:
        if subset not in subsets:
            raise UserError(f"data.subset: {subset}: {folder} has no such folder; it has {', '.join(subsets) or 'none'}")
        return [file for file in files if tops.get(file) == subset]
    if len(subsets) > 1:
        raise UserError(f"{folder}: several subsets: {', '.join(subsets)}. Fix: name one by data.subset, or name its folder")
    return files


def _declared_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that the head of a README.md declares with their files, by name."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        declared = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    configs = declared.get("configs") if isinstance(declared, dict) else None
    found = (
        [config for config in configs if isinstance(config, dict) and config.get("data_files")] if isinstance(configs, list) else []
    )
    return {str(config.get("config_name", "default")): config for config in found}


def _declared_files(
    folder: Path, configs: dict[str, dict[str, Any]], files: list[Path], subset: str | None
) -> tuple[list[Path], list[str | None]]:
    """The files of one configuration, and the split of each."""
    default = next((name for name, config in configs.items() if config.get("default") or name == "default"), None)
    name = subset or default or (next(iter(configs)) if len(configs) == 1 else None)
    if name not in configs:
        problem = f"no subset {name!r} among" if name else "several subsets:"
        raise UserError(f"{folder}: {problem} {', '.join(configs)}. Fix: name one by data.subset, or name its folder")
    found: list[Path] = []
    splits: list[str | None] = []
    for split, pattern in _patterns(configs[name]["data_files"]):
        matching = [file for file in files if file in set(folder.glob(pattern))]
        found += matching
        splits += [split] * len(matching)
    if not found:
        raise UserError(f"{folder}: README.md declares files of the subset {name!r}, and none of them is there. Fix: download them")
    return found, splits


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) of every form of `data_files`: a pattern, a list of them, and either by split."""
    if isinstance(data_files, str):
        yield "train", data_files
    elif isinstance(data_files, dict):
        for split, patterns in data_files.items():
            yield from ((split, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
    elif isinstance(data_files, list):
        for item in data_files:
            by_split = {item["split"]: item["path"]} if isinstance(item, dict) and {"split", "path"} <= item.keys() else item
            yield from _patterns(by_split)


def _saved_rows(folder: Path, split: str) -> Iterator[PlacedRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises many kinds of error
        raise UserError(f"{folder}: not a complete folder of save_to_disk ({first_line(error)})") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{folder}: no split {split!r}; there are {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield f"{folder} [{split}], row {number}", row
