"""Fingerprints of what a result was made from, and the differences between two of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_train.runtime.sources import resolve_data, resolve_model

_EDGE = 64 * 1024  # bytes hashed at both ends of a weights file: whole 32B models would take minutes


def hash_of(*values: Any) -> str:
    """16 hex digits that follow from values with a stable repr."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def hash_of_json(value: Any) -> str:
    """16 hex digits that follow from a value of lists, text and numbers, as JSON writes it: the fingerprints of samples on disk."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """One line "setting: there, here" for each value of two nested mappings that is not the same."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = dict.fromkeys([*there, *here])
        return [line for key in keys for line in differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)]
    return [] if there == here else [f"{name}: {there!r}, {here!r}"]


def model_fingerprint(base: str, revision: str | None) -> str:
    """Follows from a local model's config and weights (both ends of each file); a hub model is identified by its name alone."""
    folder = Path(resolve_model(base))
    if not folder.is_dir():
        return f"{base}@{revision or 'main'}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("tokenizer*")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(_EDGE))
            opened.seek(max(file.stat().st_size - _EDGE, 0))
            digest.update(opened.read(_EDGE))
    return digest.hexdigest()


def data_fingerprint(source: str) -> str:
    """Follows from the content of local data; a hub data set is identified by its name alone."""
    path = resolve_data(source)
    if isinstance(path, str):
        return path
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
