"""Checks of one finished feature shard: its index against its counts, and its tar against the index, key by key."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from errors import is_out_of_memory
from pipelines.store.families import FamilySchema
from pipelines.store.feature_store import TAR_END, payload_crc32, serialize_member
from pipelines.store.manifest import ShardReport


class Fault(NamedTuple):
    """What is wrong with a shard, and with which sample first, where that can be said."""

    key: str | None
    text: str


def read_index(path: Path, family: FamilySchema) -> pa.Table | Fault:
    """Return a shard's index, or what is wrong with the file."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        if is_out_of_memory(error):
            raise
        return Fault(None, f"{path.name} is not readable as Parquet: {error}")
    if not table.schema.equals(family.columns):
        return Fault(None, f"{path.name} has other columns than an index of this version")
    return table


def check_index(table: pa.Table, report: ShardReport, family: FamilySchema, *, tar_bytes: int) -> Fault | None:
    """Compare an index with the shard's report: every sample has its rows, and every payload lies in the tar.

    Args:
        table: all rows of the shard.
        report: counts of the shard.
        family: of the directory.
        tar_bytes: length of the tar.
    """
    keys = table.column("key").to_pylist()
    counts = Counter(keys)
    if wrong := next((key for key, count in counts.items() if count != family.rows_per_sample), None):
        return Fault(wrong, f"the index has {counts[wrong]} rows of it, not {family.rows_per_sample}")
    if len(counts) != report.num_read:
        return Fault(None, f"the index has {len(counts)} samples, but {report.num_read} were read")
    rejected: Counter[str] = Counter()
    for key, rows in _samples(table):
        if all(row["reject"] is not None for row in rows):
            rejected[rows[0]["reject"]] += 1
        kept = [row for row in rows if row["reject"] is None]
        end = max((tensor.end(row) for row in kept for tensor in family.tensors), default=0)
        if end > tar_bytes:
            return Fault(key, f"it ends at byte {end:,}, but the tar has {tar_bytes:,}: the tar was cut short")
    if dict(rejected) != report.rejected:
        return Fault(None, f"the index has rejects {dict(rejected)}, but {report.rejected} were counted")
    return None


def find_damage(tar: np.ndarray, table: pa.Table, family: FamilySchema) -> Fault | None:
    """Return the first sample whose bytes in the tar are not those that were written, by its CRC-32 and its headers.

    Args:
        tar: the whole file, uint8, mapped.
        table: its index, checked by `check_index`.
        family: of the directory.
    """
    position = 0
    for key, rows in _samples(table):
        kept = [row for row in rows if row["reject"] is None]
        if not kept:
            continue
        tensors = family.read(tar, kept)
        for row in kept:
            names = family.names_in(row)
            if payload_crc32(*(tensors[name] for name in names)) != row["crc32"]:
                return Fault(key, f"bytes of {' or '.join(names)} have changed (CRC-32)")
        member, _ = serialize_member(key, tensors)
        if tar[position : position + len(member)].tobytes() != member:
            return Fault(key, f"its headers have changed, in the {len(member):,} bytes from {position:,}")
        position += len(member)
    if tar[position:].tobytes() != TAR_END:
        return Fault(None, f"the tar does not end at byte {position + len(TAR_END):,}, behind its last sample")
    return None


def _samples(table: pa.Table) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for key, rows in groupby(table.to_pylist(), key=lambda row: row["key"]):
        yield key, list(rows)
