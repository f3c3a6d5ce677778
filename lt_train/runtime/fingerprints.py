"""Fingerprints of what a result was made from, and the one error that is raised where two of them differ.

Every hash that a run folder, an export or a teacher keeps is computed here. A changed hash makes finished stages of earlier runs
unfinished, and their samples those of another model.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import resolve_data, resolve_model

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**20
"""Bytes that `sampled_file_hash` reads at a time."""
BLOCKS_READ = 256
"""Blocks that `sampled_file_hash` reads of a file: all of it up to 256 MiB, evenly spaced blocks of a larger one."""

PAGE = 4096
"""Bytes that `weights_fingerprint` reads at a time."""
PAGES_READ = 512
"""Pages that `weights_fingerprint` reads of a file: one every 10 MB of a file of 5 GB, so that few matrices are passed over."""

_EDGE = 64 * 1024  # bytes hashed at both ends of a weights file: whole 32B models would take minutes
_VALUES_PER_WEIGHT = 64
_SHORT = 16  # hex digits


def sha256_of(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_of(*values: Any) -> str:
    """16 hex digits that follow from values with a stable repr."""
    return sha256_of([repr(values).encode()])[:_SHORT]


def hash_of_text(text: str) -> str:
    """16 hex digits that follow from a text, which may hold lone surrogates."""
    return sha256_of([text.encode("utf-8", "surrogatepass")])[:_SHORT]


def hash_of_json(value: Any, *, sort_keys: bool = False) -> str:
    """16 hex digits that follow from a value of lists, text and numbers, as JSON writes it; other values by their str."""
    return sha256_of([json.dumps(value, sort_keys=sort_keys, default=str).encode()])[:_SHORT]


def hash_of_weights(weights: "Mapping[str, Tensor]") -> str:
    """16 hex digits that follow from name, shape and 64 values of each weight."""

    def parts() -> Iterator[bytes]:
        for name, weight in sorted(weights.items()):
            flat = weight.flatten()
            picked = flat[:: max(1, flat.numel() // _VALUES_PER_WEIGHT)][:_VALUES_PER_WEIGHT]
            yield f"{name}{tuple(weight.shape)}".encode()
            yield picked.cpu().double().numpy().tobytes()

    return sha256_of(parts())[:_SHORT]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sampled_file_hash(path: Path, block: int = BLOCK, blocks_read: int = BLOCKS_READ) -> str:
    """SHA-256 of evenly spaced blocks of a file: of all of it up to `blocks_read` of them. By default 100 GB take a second.

    Args:
        block: bytes.
    """
    size = path.stat().st_size

    def blocks() -> Iterator[bytes]:
        with open(path, "rb") as opened:
            for start in range(0, size, max(block, size // blocks_read)):
                opened.seek(start)
                yield opened.read(block)

    return sha256_of(blocks())


def model_fingerprint(base: str, revision: str | None) -> str:
    """Follows from a local model's config and weights (both ends of each file); a hub model is identified by its name alone."""
    folder = Path(resolve_model(base))
    if not folder.is_dir():
        return f"{base}@{revision or 'main'}"

    def parts() -> Iterator[bytes]:
        yield (folder / "config.json").read_bytes()
        for file in sorted([*_weights_in(folder), *folder.glob("tokenizer*")]):
            size = file.stat().st_size
            yield f"{file.name} {size}".encode()
            with open(file, "rb") as opened:
                yield opened.read(_EDGE)
                opened.seek(max(size - _EDGE, 0))
                yield opened.read(_EDGE)

    return sha256_of(parts())


def weights_fingerprint(base: str) -> str | None:
    """Follows from pages all over the files of a local model's weights: merging an adapter may change no end of a file.

    None of a hub model.
    """
    folder = Path(resolve_model(base))
    if not folder.is_dir():
        return None
    return hash_of(*(sampled_file_hash(file, PAGE, PAGES_READ) for file in sorted(_weights_in(folder))))


def _weights_in(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin")]


def data_fingerprint(source: str) -> str:
    """Follows from the content of local data; a hub data set is identified by its name alone."""
    path = resolve_data(source)
    if isinstance(path, str):
        return path
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_of(bytes.fromhex(file_hash(file)) for file in files if file.is_file())


def check_same(there: Any, here: Any, problem: str, fix: str, may_differ: Collection[str] = ()) -> None:
    """
    Args:
        there: nested mappings of settings, as a file or server holds them. here: as they are requested now.
        may_differ: dotted names of settings that are not compared, nor those inside them.

    Raises:
        UserError: they differ; the message is `problem`, a line for each setting with both values, and `fix`.
    """
    if differing := list(_differences(there, here, "", may_differ)):
        listed = "".join(f"\n  {line}" for line in differing)
        raise UserError(f"{problem} (there, here):{listed}\nFix: {fix}")


def _differences(there: Any, here: Any, name: str, may_differ: Collection[str]) -> Iterator[str]:
    if name in may_differ or there == here:
        return
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key, may_differ)
    else:
        yield f"{name}: {there!r}, {here!r}"
