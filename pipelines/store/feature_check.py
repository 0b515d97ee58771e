"""Checks of one finished feature shard: its index against its counts, and its tar against the index, key by key."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.store.feature_store import (
    LATENT_SCHEMA,
    TAR_END,
    TEXT_SCHEMA,
    TEXT_STORAGE_DTYPES,
    payload_crc32,
    read_payload,
    serialize_member,
)
from pipelines.store.manifest import Manifest, ShardReport


class Fault(NamedTuple):
    """What is wrong with a shard, and with which sample first, where that can be said."""

    key: str | None
    text: str


def text_storage(manifest: Manifest) -> str | None:
    """Return how a directory's captions are stored, or None for a directory of latents.

    Before there was a choice it was bfloat16, and not said.
    """
    return manifest.extra["text"].get("storage", "bfloat16") if "text" in manifest.extra else None


def read_index(path: Path, *, storage: str | None) -> pa.Table | Fault:
    """Return a shard's index, or what is wrong with the file; `storage` is None for latents."""
    schema = LATENT_SCHEMA if storage is None else TEXT_SCHEMA
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        return Fault(None, f"{path.name} is not readable as Parquet: {error}")
    if not table.schema.equals(schema):
        return Fault(None, f"{path.name} has other columns than an index of this version")
    return table


def check_index(table: pa.Table, report: ShardReport, *, tar_bytes: int, num_captions: int) -> Fault | None:
    """Compare an index with the shard's report: every sample has its rows, and every payload lies in the tar.

    Args:
        table: all rows of the shard.
        report: counts of the shard.
        tar_bytes: length of the tar.
        num_captions: rows of a sample; 1 for latents.
    """
    keys = table.column("key").to_pylist()
    counts = Counter(keys)
    if wrong := next((key for key, count in counts.items() if count != num_captions), None):
        return Fault(wrong, f"the index has {counts[wrong]} rows of it, not {num_captions}")
    if len(counts) != report.num_read:
        return Fault(None, f"the index has {len(counts)} samples, but {report.num_read} were read")
    rejected: Counter[str] = Counter()
    for key, rows in _samples(table):
        if all(row["reject"] is not None for row in rows):
            rejected[rows[0]["reject"]] += 1
        end = max((_end(row) for row in rows if row["reject"] is None), default=0)
        if end > tar_bytes:
            return Fault(key, f"it ends at byte {end:,}, but the tar has {tar_bytes:,}: the tar was cut short")
    if dict(rejected) != report.rejected:
        return Fault(None, f"the index has rejects {dict(rejected)}, but {report.rejected} were counted")
    return None


def find_damage(tar: np.ndarray, table: pa.Table, *, storage: str | None) -> Fault | None:
    """Return the first sample whose bytes in the tar are not those that were written, by its CRC-32 and its headers.

    Args:
        tar: the whole file, uint8, mapped.
        table: its index, checked by `check_index`.
        storage: as `features.text_storage`; None for latents.
    """
    position = 0
    for key, rows in _samples(table):
        kept = [row for row in rows if row["reject"] is None]
        if not kept:
            continue
        tensors = _latents(tar, kept[0]) if storage is None else _captions(tar, kept, storage=storage)
        for row in kept:
            names = ("mean", "std") if storage is None else _caption_names(row)
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


def _end(row: Mapping[str, Any]) -> int:
    if "std_offset" in row:
        return max(row["mean_offset"], row["std_offset"]) + row["nbytes"]
    scale_end = 0 if row["scale_offset"] is None else row["scale_offset"] + 4 * row["num_tokens"]
    return max(row["offset"] + row["nbytes"], scale_end)


def _latents(tar: np.ndarray, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    shape = (row["channels"], row["height"], row["width"])
    return {name: read_payload(tar, row[f"{name}_offset"], dtype="float16", shape=shape) for name in ("mean", "std")}


def _caption_names(row: Mapping[str, Any]) -> list[str]:
    names = ["embedding"] if row["scale_offset"] is None else ["embedding", "scale"]
    return [f"{name}_{row['caption_index']}" for name in names]


def _captions(tar: np.ndarray, rows: Sequence[Mapping[str, Any]], *, storage: str) -> dict[str, np.ndarray]:
    """Return a sample's tensors in the order they were written in: embeddings before scales."""
    dtype = TEXT_STORAGE_DTYPES[storage]
    embeddings, scales = {}, {}
    for row in rows:
        values = tar[row["offset"] : row["offset"] + row["nbytes"]].view(dtype).reshape(row["num_tokens"], -1)
        embeddings[f"embedding_{row['caption_index']}"] = values
        if row["scale_offset"] is not None:
            shape = (row["num_tokens"],)
            scales[f"scale_{row['caption_index']}"] = read_payload(
                tar, row["scale_offset"], dtype="float32", shape=shape
            )
    return embeddings | scales
