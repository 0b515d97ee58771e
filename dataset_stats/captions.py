"""Rows of captions: one small reader per layout, all giving the same rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import open_shard
from pipelines.raw.texts import decode_text, text_members
from pipelines.store.files import is_remote, open_binary

ROWS_PER_BLOCK = 16_384
ADDRESS_SEPARATOR = "#"
TEXT_FILES_ALONE = Reading(dialect="generic")  # of a tar, not its JSON
PIPELINE_COLUMN = "caption"  # what captioning wrote
# Columns of the tables that img2dataset writes beside its tars, which list failed downloads too.
IMG2DATASET_COLUMNS = {"key", "status", "error_message"}
Item = TypeVar("Item")
Rows = range | np.ndarray  # ascending row numbers
log = get_logger("dataset_stats")


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One sample: its text, or the reason why it has none that counts.

    Attributes:
        flags: what captioning noticed about the caption, such as "loop".
    """

    key: str
    text: str | None
    flags: tuple[str, ...] = ()
    reject: str | None = None


@dataclass(frozen=True, kw_only=True)
class RowSample:
    """Rows drawn from a source; so few numbers say which that every worker draws them for itself."""

    num_rows: int
    num_chosen: int
    seeds: tuple[int, int]

    def rows(self) -> np.ndarray:
        """Ascending row numbers, int64 [num_chosen]."""
        rng = np.random.default_rng(self.seeds)
        return np.sort(rng.choice(self.num_rows, self.num_chosen, replace=False))


@dataclass(frozen=True, kw_only=True)
class Address:
    """What a worker must know to read a source; travels as the source's path."""

    layout: str
    column: str
    path: str
    sample: RowSample | None = None

    def __str__(self) -> str:
        sample = self.sample
        drawn = f"{sample.num_chosen}/{sample.num_rows}/{sample.seeds[0]}/{sample.seeds[1]}" if sample else ""
        return ADDRESS_SEPARATOR.join([self.layout, drawn, self.column, self.path])

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read back what `str` gave."""
        layout, drawn, column, path = text.split(ADDRESS_SEPARATOR, 3)
        sample = None
        if drawn:
            num_chosen, num_rows, *seeds = (int(part) for part in drawn.split("/"))
            sample = RowSample(num_rows=num_rows, num_chosen=num_chosen, seeds=(seeds[0], seeds[1]))
        return cls(layout=layout, column=column, path=path, sample=sample)


def read_rows(address: Address, start: int, stop: int) -> Iterator[list[CaptionRow]]:
    """Yield the rows [start, stop) of a source in blocks of bounded size, in order; of a sample, those of the sample.

    Raises:
        UserError: the column does not exist; names the columns there are.
    """
    chosen = range(start, stop) if address.sample is None else address.sample.rows()[start:stop]
    rows = _READERS[address.layout](address, chosen)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield block


def count_rows(address: Address) -> int:
    """Number of rows of a file or folder; those of the "captions" and "raw" layouts are known from elsewhere.

    Raises:
        UserError: the column does not exist; names the columns there are.
    """
    if address.layout == "parquet":
        with open_binary(address.path) as file:
            parquet = pq.ParquetFile(file)
            _require_column(address, parquet.schema_arrow.names)
            return parquet.metadata.num_rows
    if address.layout == "jsonl":
        with open_binary(address.path) as file:
            first = file.readline()
            record = _json_object(first)
            if record is not None:
                _require_column(address, list(record))
            return sum(1 for _ in file) + bool(first)
    if address.layout == "csv":
        return sum(1 for _ in _read_csv(address, range(2**62)))
    if _is_folder(address.path):
        return len(text_files(address.path))
    with open_shard(address.path) as shard:
        if shard.fault is not None:
            log.warning(f"{address.path}: {shard.fault}")
        if shard.unusable:
            log.warning(f"{address.path}: {len(shard.unusable)} members are no samples, such as {shard.unusable[0]}")
        return sum(map(_has_text_file, shard.samples))


def text_files(folder: str) -> list[Path]:
    """The `.txt` files of a folder and of the folders in it, in the order of their paths."""
    return sorted(Path(folder).rglob("*.txt"))


def readable(name: Any) -> str:
    """`name` as text that any file can hold: what is not UTF-8 in it is spelled out, so that names stay apart."""
    if isinstance(name, bytes):
        return name.decode("utf-8", errors="backslashreplace")
    return str(name).encode("utf-8", errors="backslashreplace").decode()


def _is_folder(path: str) -> bool:
    return not is_remote(path) and Path(path).is_dir()


def _pick(items: Iterable[Item], rows: Rows) -> Iterator[tuple[int, Item]]:
    """The items at the given places, with their places."""
    if isinstance(rows, range):
        yield from itertools.islice(enumerate(items), rows.start, rows.stop)
        return
    numbered = enumerate(items)
    for row in rows.tolist():
        yield next(pair for pair in numbered if pair[0] == row)


def _require_column(address: Address, columns: Sequence[str]) -> None:
    if address.column not in columns:
        raise UserError(f"{address.path}: no column {address.column!r}; columns are {', '.join(columns)}")


def _read_captions(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    for row in _parquet_rows(address, rows, columns=("key", address.column, "flags", "reject")):
        # Flags are about the caption; the sample's alt text has none.
        flags = (row.get("flags") or ()) if address.column == PIPELINE_COLUMN else ()
        caption = _row(row["key"], row[address.column])
        yield replace(
            caption,
            flags=tuple(flag for flag in flags.split(",") if flag) if isinstance(flags, str) else tuple(flags),
            reject=row.get("reject") or caption.reject,
        )


def _read_parquet(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    columns = ("key", "__key__", "id", "status", "error_message", address.column)
    for number, row in zip(rows, _parquet_rows(address, rows, columns=columns), strict=False):
        key = row.get("key") or row.get("__key__") or row.get("id") or number
        if row.keys() >= IMG2DATASET_COLUMNS and row["status"] != "success":
            yield _rejected(key, row["status"] or "no_status")
        else:
            yield _row(key, row[address.column])


def _parquet_rows(address: Address, rows: Rows, *, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open_binary(address.path) as file:
        parquet = pq.ParquetFile(file)
        _require_column(address, parquet.schema_arrow.names)
        present = [column for column in dict.fromkeys(columns) if column in parquet.schema_arrow.names]
        wanted = np.arange(rows.start, min(rows.stop, parquet.metadata.num_rows)) if isinstance(rows, range) else rows
        position = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            begin, end = np.searchsorted(wanted, (position, position + num_rows))
            if begin < end:
                table = parquet.read_row_group(group, columns=present)
                inside = wanted[begin:end] - position
                is_run = inside[-1] - inside[0] + 1 == len(inside)
                table = table.slice(inside[0], len(inside)) if is_run else table.take(inside)
                for batch in table.to_batches(max_chunksize=ROWS_PER_BLOCK):
                    yield from _python_rows(batch, address.column)
            position += num_rows


def _python_rows(batch: pa.RecordBatch, text_column: str) -> Iterator[dict[str, Any]]:
    """Rows of a batch; the text as bytes, to be decoded row by row, since files in the wild hold what is not UTF-8."""
    columns = []
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            columns.append(values.to_pylist())
            continue
        strings = values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values
        found = strings.cast(pa.large_binary()).to_pylist()
        if name != text_column:
            found = [None if value is None else readable(value) for value in found]
        columns.append(found)
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _row(key: Any, text: Any) -> CaptionRow:
    if text is not None and not isinstance(text, str | bytes):
        return _rejected(key, "not_text")
    try:
        if isinstance(text, bytes):
            text = decode_text(text)
        elif text is not None:
            text.encode("utf-8")  # JSON can hold half of a surrogate pair
    except UnicodeError:
        return _rejected(key, "not_utf8")
    return CaptionRow(key=readable(key), text=text)


def _rejected(key: Any, reason: str) -> CaptionRow:
    return CaptionRow(key=readable(key), text=None, reject=reason)


def _read_jsonl(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    with open_binary(address.path) as file:
        for index, line in _pick(file, rows):
            record = _json_object(line)
            if record is None:
                yield _rejected(index, "not_json")
            else:
                yield _row(record.get("key", index), record.get(address.column))


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply; ValueError: also a number too long
        return None
    return record if isinstance(record, dict) else None


def _read_csv(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    with open_binary(address.path) as file:
        # surrogateescape keeps bytes that are not UTF-8 recognisable, row by row.
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters would end the run
        records = csv.DictReader(lines)
        _require_column(address, list(records.fieldnames or []))
        for index, record in _pick(records, rows):
            text = record.get(address.column)
            raw = None if text is None else text.encode("utf-8", errors="surrogateescape")
            yield _row(record.get("key") or index, raw)


def _read_text(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    if _is_folder(address.path):
        for _, path in _pick(text_files(address.path), rows):
            yield _row(path.stem, path.read_bytes())
        return
    with open_shard(address.path, TEXT_FILES_ALONE) as shard:
        for _, sample in _pick(filter(_has_text_file, shard.samples), rows):
            if sample.reject == "cut_off":
                yield _rejected(sample.key, sample.reject)
                continue
            try:
                yield _row(sample.key, shard.alt_text(sample))
            except SampleReject as reject:
                yield _rejected(sample.key, reject.reason)


def _has_text_file(sample: RawSample) -> bool:
    return bool(text_members(list(sample.members), sample.image_extension))


def _read_raw(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    with open_shard(address.path) as shard:
        for _, sample in _pick(shard.samples, rows):
            if sample.reject:
                yield _rejected(sample.key, sample.reject)
                continue
            try:
                yield _row(sample.key, shard.alt_text(sample))
            except SampleReject as reject:
                yield _rejected(sample.key, reject.reason)


_READERS: dict[str, Callable[[Address, Rows], Iterator[CaptionRow]]] = {
    "captions": _read_captions,
    "raw": _read_raw,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "text": _read_text,
}
