"""Atomic writing, by which a reader never finds half a file, and reading that notices a truncated last line.

Whole files are written beside their target and renamed; JSON Lines files grow by one flushed line at a time, so the only damage a
`kill -9` can do to them is a last line without its newline.
"""

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from lt_train.runtime.errors import UserError, kind_of

_TEMPORARY = re.compile(rf"\..+\.(?P<host>{re.escape(platform.node())}|[^.]+)\.(?P<process>\d+)\.tmp")
"""Names of the files that `replacing` makes; of another machine the last part of its name is enough."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without error it takes the place of `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")  # hosts may share the folder
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove from a folder and those in it what processes left that were killed inside `replacing`.

    Call it where no process of another machine writes there: whether one of those is alive cannot be seen.
    """
    for path in folder.rglob(".*.tmp"):
        made = _TEMPORARY.fullmatch(path.name)
        if made and not (made["host"] == platform.node() and Path("/proc", made["process"]).exists()):
            path.unlink(missing_ok=True)


def set_aside(folder: Path, name: Path | None = None) -> Path:
    """Rename a folder to `name`, by default its own, with the first free number; returns that."""
    name = name or folder
    free = next(path for number in count(1) if not (path := name.with_name(f"{name.name}-{number}")).exists())
    return folder.rename(free)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file that lt_train wrote. `what` names it in the error: "layer profile", "scores"."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not a complete {what} ({error}). Fix: delete it and run again") from error


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Add one row and flush it to the operating system, so that it survives the death of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_cut_line(path: Path) -> bool:
    """Remove a last line that lacks its newline (a writer died in it). Returns whether there was one."""
    if not path.exists():
        return False
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete == len(content):
        return False
    with open(path, "r+b") as file:
        file.truncate(complete)
    return True


def read_json_lines(path: Path, *, being_written: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", row) for each row of a JSON Lines file; blank lines are passed over.

    Args:
        being_written: pass over a last line without its newline, too: its writer died in it, or is still at it.

    Raises:
        UserError: the file cannot be read, a line is not JSON, or is not an object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and (line.endswith(b"\n") or not being_written):
                    yield f"{path}:{number}", _checked_row(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _checked_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        return json_row(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def json_row(line: bytes) -> dict[str, Any]:
    """One line of a JSON Lines file.

    Raises:
        ValueError: it is not UTF-8, not JSON or not an object; its text has the reason.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; the file ends in the middle of this line"
        raise ValueError(f"not JSON ({error}){cut}. Fix: correct the line, or remove it") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, this is {kind_of(row)}")
    return row
