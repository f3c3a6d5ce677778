"""The content of a `.wandb` file: the part of a run that survived the death of the process that tracked it.

A file of LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a header of wandb's: blocks of
32 KiB, in them chunks of a header (CRC-32, length, kind) and data; one or more chunks are a protobuf record. wandb has a reader of
it only in its Go program (core/internal/transactionlog), which `wandb sync` runs.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32 * 1024
FILE_HEADER_BYTES = 7
CHUNK_HEADER = struct.Struct("<IHB")
FULL, LAST = 1, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of `run.log`, in the order of writing, up to where the file is truncated or damaged; so does `wandb sync`."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    position, record = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER.size:
            position += left_in_block
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(content, position)
        start = position + CHUNK_HEADER.size
        position = start + length
        if position > len(content) or zlib.crc32(content[start - 1 : position]) != checksum:  # it covers kind and data
            return
        record += content[start:position]
        if kind in (FULL, LAST):
            yield record
            record = b""
