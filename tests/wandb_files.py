"""What a run of Weights & Biases holds on disk: its `.wandb` file is a log in LevelDB's format, of its own records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER_BYTES = 7  # of the file, and of each piece of a record: checksum, length, which piece it is
BLOCK_BYTES = 32_768
FULL, LAST = 1, 4


def history(path: Path) -> list[dict[str, Any]]:
    """Return what was logged, a line each time."""
    lines = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def records(data: bytes) -> Iterator[bytes]:
    place, record = HEADER_BYTES, b""
    while place + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < HEADER_BYTES:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + HEADER_BYTES : place + HEADER_BYTES + length]
        place += HEADER_BYTES + length
        if kind in (FULL, LAST):
            yield record
            record = b""
