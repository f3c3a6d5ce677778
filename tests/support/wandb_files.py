"""The files that wandb writes offline, read back."""

import json
import time
from pathlib import Path
from typing import Any


def segments(run_folder: Path) -> list[Path]:
    """wandb's data files, oldest first, once its own process has written them out (offline, finish() does not wait for it)."""
    found = sorted(run_folder.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 30
    while not all(is_finished(segment) for segment in found):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def is_finished(segment: Path) -> bool:
    return any(r.WhichOneof("record_type") == "exit" for r in records(segment))


def records(segment: Path) -> list[Any]:
    """The protobuf records of a .wandb file (wandb's LevelDB log: 7 bytes of file header, then blocks of 32 KiB)."""
    from wandb.proto import wandb_internal_pb2

    data, position, partial, found = segment.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little of the block is left for a header: padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):  # the writer was killed
            break
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            found.append(record)
            partial = b""
    return found


def run_ids(segment: Path) -> set[str]:
    return {r.run.run_id for r in records(segment) if r.WhichOneof("record_type") == "run"}


def history(segment: Path) -> list[dict[str, Any]]:
    rows = [r.history.item for r in records(segment) if r.WhichOneof("record_type") == "history"]
    return [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in row} for row in rows]
