"""Where captions come from: one small reader per layout, all giving the same rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_stats.config import CaptionSet
from pipelines.manifest import Manifest
from pipelines.pieces import Source
from pipelines.shards import describe_shards, expand_shards, open_shard, select_shards, shard_name
from pipelines.storage import is_remote, open_binary, sha256_text

ROWS_PER_BLOCK = 16_384


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One sample: its text, or the reason why it has none that counts.

    Attributes:
        flags: what the captioning stage noticed about the caption, such as "loop".
    """

    key: str
    text: str | None
    flags: tuple[str, ...] = ()
    reject: str | None = None


@dataclass(frozen=True, kw_only=True)
class Address:
    """What a worker must know to read a source; travels as the source's path."""

    layout: str
    column: str
    path: str

    def __str__(self) -> str:
        return f"{self.layout}#{self.column}#{self.path}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read back what `str` gave."""
        layout, column, path = text.split("#", 2)
        return cls(layout=layout, column=column, path=path)


def caption_sources(
    name: str, caption_set: CaptionSet, *, captions: Manifest | None, captions_folder: Path, raw_shards: Sequence[str]
) -> list[Source]:
    """Sources of the caption set `name`.

    Args:
        captions: manifest of RUN/captions, for the "captions" layout.
        captions_folder: RUN/captions.
        raw_shards: paths of data.shards, for the "raw" layout.

    Raises:
        ValueError: a shard pattern matches nothing, or `files` is missing.
    """
    key = f"dataset_stats.sets.{name}"
    column = caption_set.column
    if caption_set.layout == "captions":
        assert captions is not None, "the captions layout needs the captions manifest"
        shards = select_shards(sorted(captions.shards), caption_set.shards, key=f"{key}.shards")
        return [
            Source(
                name=f"{shard}.{column}",
                path=str(Address(layout="captions", column=column, path=str(captions_folder / f"{shard}.parquet"))),
                identity=captions.shards[shard].files[".parquet"],
                num_samples=captions.shards[shard].num_read,
            )
            for shard in shards
        ]
    if caption_set.layout == "raw":
        paths = select_shards(raw_shards, caption_set.shards, key=f"{key}.shards")
        addresses = [Address(layout="raw", column=column, path=path) for path in paths]
        described = describe_shards(paths, run=captions_folder.parent)
        return [
            replace(shard.source, name=_source_name(address), path=str(address))
            for address, shard in zip(addresses, described, strict=True)
        ]
    if caption_set.files:
        paths = _expand_files(caption_set)
    else:
        raise ValueError(f'{key}.files is missing; layout "{caption_set.layout}" needs it')
    return [_file_source(Address(layout=caption_set.layout, column=column, path=path)) for path in paths]


def read_rows(address: Address, start: int, stop: int) -> Iterator[list[CaptionRow]]:
    """Yield the rows [start, stop) of a source in blocks of bounded size, in order.

    Raises:
        ValueError: the column does not exist; names the columns there are.
    """
    reader = _READERS[address.layout]
    rows = reader(address, start, stop)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield block


def _expand_files(caption_set: CaptionSet) -> list[str]:
    if caption_set.layout == "text":
        patterns = [caption_set.files] if isinstance(caption_set.files, str) else caption_set.files
        folders = [pattern for pattern in patterns if Path(pattern).is_dir() and any(Path(pattern).glob("*.txt"))]
        tars = [pattern for pattern in patterns if pattern not in folders]
        return folders + (expand_shards(tars) if tars else [])
    return expand_shards(caption_set.files)


def _file_source(address: Address) -> Source:
    path = address.path
    if is_remote(path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        info = filesystem.info(inner)
        stamp = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        identity = f"{info['size']}:{stamp}"
    elif Path(path).is_dir():
        files = sorted(Path(path).glob("*.txt"))
        identity = sha256_text(
            "".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}\n" for file in files)
        )
    else:
        identity = f"{Path(path).stat().st_size}:{Path(path).stat().st_mtime_ns}"
    return Source(
        name=_source_name(address),
        path=str(address),
        identity=identity,
        num_samples=_count_rows(address),
    )


def _source_name(address: Address) -> str:
    name = Path(shard_name(address.path)).stem
    return f"{name}-{sha256_text(address.path)[:8]}.{address.layout}-{address.column}"


def _count_rows(address: Address) -> int:
    if address.layout == "parquet":
        with open_binary(address.path) as file:
            return pq.ParquetFile(file).metadata.num_rows
    if address.layout == "jsonl":
        with open_binary(address.path) as file:
            return sum(1 for _ in file)
    return sum(1 for _ in _READERS[address.layout](address, 0, 2**62))


def _require_column(address: Address, columns: Sequence[str]) -> None:
    if address.column not in columns:
        raise ValueError(f"{address.path}: no column {address.column!r}; columns are {', '.join(columns)}")


def _read_captions(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    for row in _parquet_rows(address, start, stop, columns=("key", address.column, "flags", "reject")):
        flags = row.get("flags") or ()
        caption = _row(row["key"], row[address.column])
        yield replace(
            caption,
            flags=tuple(flag for flag in flags.split(",") if flag) if isinstance(flags, str) else tuple(flags),
            reject=row.get("reject") or caption.reject,
        )


def _read_parquet(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    rows = _parquet_rows(address, start, stop, columns=("key", "__key__", "id", address.column))
    for index, row in enumerate(rows, start=start):
        key = row.get("key") or row.get("__key__") or row.get("id") or index
        yield _row(str(key), row[address.column])


def _parquet_rows(address: Address, start: int, stop: int, *, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open_binary(address.path) as file:
        parquet = pq.ParquetFile(file)
        _require_column(address, parquet.schema_arrow.names)
        present = [column for column in dict.fromkeys(columns) if column in parquet.schema_arrow.names]
        position = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            begin, end = max(start - position, 0), min(stop - position, num_rows)
            position += num_rows
            if begin < end:
                table = parquet.read_row_group(group, columns=present).slice(begin, end - begin)
                for batch in table.to_batches(max_chunksize=ROWS_PER_BLOCK):
                    yield from _bytes_for_text(batch, address.column).to_pylist()


def _bytes_for_text(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    # Parquet files in the wild hold text that is not UTF-8; as bytes it can be looked at row by row.
    values = batch.column(column)
    if pa.types.is_string(values.type):
        return batch.set_column(batch.schema.get_field_index(column), column, values.cast(pa.binary()))
    return batch


def _row(key: str, text: Any) -> CaptionRow:
    if text is not None and not isinstance(text, str | bytes):
        return CaptionRow(key=key, text=None, reject="not_text")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        elif text is not None:
            text.encode("utf-8")  # JSON can hold half of a surrogate pair
    except UnicodeError:
        return CaptionRow(key=key, text=None, reject="not_utf8")
    return CaptionRow(key=key, text=text)


def _read_jsonl(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    with open_binary(address.path) as file:
        for index, line in itertools.islice(enumerate(file), start, stop):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                yield CaptionRow(key=str(index), text=None, reject="not_json")
                continue
            if not isinstance(record, dict):
                yield CaptionRow(key=str(index), text=None, reject="not_json")
                continue
            if index == 0:
                _require_column(address, list(record))
            yield _row(str(record.get("key", index)), record.get(address.column))


def _read_csv(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    with open_binary(address.path) as file:
        # surrogateescape keeps bytes that are not UTF-8 recognisable, row by row.
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = csv.DictReader(lines)
        _require_column(address, list(records.fieldnames or []))
        for index, record in itertools.islice(enumerate(records), start, stop):
            text = record.get(address.column)
            raw = None if text is None else text.encode("utf-8", errors="surrogateescape")
            yield _row(str(record.get("key") or index), raw)


def _read_text(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    if not is_remote(address.path) and Path(address.path).is_dir():
        for path in sorted(Path(address.path).glob("*.txt"))[start:stop]:
            yield _row(path.stem, path.read_bytes())
        return
    with open_shard(address.path) as shard:
        with_text = [sample for sample in shard.samples if "txt" in sample.members]
        for sample in with_text[start:stop]:
            yield _row(sample.key, shard.read(sample.members["txt"]))


def _read_raw(address: Address, start: int, stop: int) -> Iterator[CaptionRow]:
    with open_shard(address.path) as shard:
        for sample in shard.samples[start:stop]:
            if sample.reject:
                yield CaptionRow(key=sample.key, text=None, reject=sample.reject)
                continue
            try:
                yield _row(sample.key, shard.alt_text(sample))
            except ValueError:
                yield CaptionRow(key=sample.key, text=None, reject="corrupt_alt_text")


_READERS: dict[str, Callable[[Address, int, int], Iterator[CaptionRow]]] = {
    "captions": _read_captions,
    "raw": _read_raw,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "text": _read_text,
}
