"""The manifest of an export, written into its folder last: a folder without it is no complete export."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lt_train.export.metadata import ExportMetadata
from lt_train.export.verify import Check
from lt_train.export.weights import ExportedHybrid
from lt_train.runtime import files
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import file_hash, sha256_of
from lt_train.runtime.run_paths import EXPORT_MANIFEST

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        content: fingerprint of all that was exported (`content_fingerprint`).
        files: name -> SHA-256 and size in bytes of every other file of the folder.
        check: how the export was found to compute what the model in memory computes; None: it was not compared.
        unchecked: why not.
    """

    content: str
    files: dict[str, dict[str, Any]]
    check: Check | None
    unchecked: str | None = None

    def write(self, folder: Path) -> None:
        files.write_json(folder / EXPORT_MANIFEST, {"format": FORMAT, **asdict(self)})


def make_manifest(folder: Path, content: str, check: Check | str) -> Manifest:
    """Args: check: its result, or why there was none."""
    found = {path.name: _described(path) for path in sorted(folder.iterdir())}
    return Manifest(content, found, None, check) if isinstance(check, str) else Manifest(content, found, check)


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        UserError: none there, or not one of this version.
    """
    found = files.read_json(folder / EXPORT_MANIFEST, "export manifest")
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise UserError(
            f"{folder / EXPORT_MANIFEST}: not an export manifest of this version of lt_train. Export into another folder"
        )
    try:
        known = {name: dict(known) for name, known in found["files"].items()}
        unchecked = found.get("unchecked")
        return Manifest(found["content"], known, None if unchecked else Check(**found["check"]), unchecked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / EXPORT_MANIFEST}: not a complete export manifest ({error!r}). Fix: export or download it again"
        ) from error


def verify_files(folder: Path) -> Manifest:
    """The manifest of an export whose files are those that were exported, and no others.

    Hidden files, such as those of git and of the hub's client, are left out. The manifest itself has no signature.

    Raises:
        UserError: no export, or a file is missing, changed or none of the export's; the message names it.
    """
    if not (folder / EXPORT_MANIFEST).is_file():
        what = f"no export: there is no {EXPORT_MANIFEST}" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}. Fix: name the folder of an export, runs/<name>/export")
    manifest = read_manifest(folder)
    faults = [
        f"{name}: {'changed since it was exported' if (folder / name).is_file() else 'missing'}"
        for name in damaged_files(folder, manifest)
    ]
    faults += [f"{name}: not a file of the export" for name in _other_files(folder, manifest)]
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}. Fix: run no code of it, and export or download it again")
    return manifest


def damaged_files(folder: Path, manifest: Manifest, *, by_size: bool = False) -> list[str]:
    """Names of the files that are missing or changed.

    Args:
        by_size: compare sizes alone, which reads no file.
    """

    def is_whole(path: Path, known: dict[str, Any]) -> bool:
        return path.is_file() and (path.stat().st_size == known.get("bytes") if by_size else _described(path) == known)

    return [name for name, known in manifest.files.items() if not is_whole(folder / name, known)]


def _other_files(folder: Path, manifest: Manifest) -> list[str]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    known = {EXPORT_MANIFEST, *manifest.files}
    return [str(name) for name in names if str(name) not in known and not any(part.startswith(".") for part in name.parts)]


def content_fingerprint(described: Path, hybrid: ExportedHybrid, dtype: torch.dtype, metadata: ExportMetadata) -> str:
    """SHA-256 of what goes into an export: the small files in `described`, the weights in `dtype`, the metadata of the card."""

    def parts() -> Iterator[bytes | memoryview]:
        for path in sorted(described.iterdir()):
            yield f"{path.name}\0{file_hash(path)}\0".encode()
        names = {id(parameter): name for name, parameter in hybrid.parameters.items()}
        for name, parameter in sorted(hybrid.skeleton.state_dict(keep_vars=True).items()):  # tied weights under each of their names
            weight = hybrid.weight(names[id(parameter)], dtype)
            yield f"{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode()
            yield weight.flatten().view(torch.uint8).numpy().data
        yield json.dumps(asdict(metadata), sort_keys=True).encode()

    return sha256_of(parts())


def is_exported(folder: Path, content: str) -> bool:
    """Whether `folder` is a complete export of this content.

    Raises:
        UserError: something else is there, or the export has been damaged.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / EXPORT_MANIFEST).is_file():
        raise UserError(
            f"{folder}: exists and is no export of lt_train; it is left alone. Export into another folder, or move it away"
        )
    manifest = read_manifest(folder)
    if manifest.content != content:
        raise UserError(
            f"{folder}: holds another export (other weights, settings, scores or versions); nothing is overwritten. "
            "Export into another folder, or move this one away"
        )
    damaged = damaged_files(folder, manifest)
    if damaged:
        raise UserError(
            f"{folder}: files are missing or changed since it was exported: {', '.join(damaged)}. Move it away and export again"
        )
    return True


def _described(path: Path) -> dict[str, Any]:
    return {"sha256": file_hash(path), "bytes": path.stat().st_size}
