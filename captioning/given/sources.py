"""The rows of a source of texts, one after the other: tables, tars of texts, and folders of text files."""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.given.addresses import TextAddress, choose_columns, text_files
from captioning.given.places import place_of
from pipelines.raw.images import SampleReject
from pipelines.raw.shards import open_shard
from pipelines.raw.table_rows import key_of_cell, text_of_cell
from pipelines.raw.tables import open_table, require_sound
from pipelines.store.files import is_remote, open_ranges

NUM_READERS = 16
FILES_AT_ONCE = 4096
EVERY_ROW = range(sys.maxsize)
NO_KEY, NO_TEXT = "no_key", "no_text"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row: the place it names, and its text or what is wrong with it; a row without a place is of no sample."""

    place: str | None = None
    text: str | None = None
    fault: str | None = None


def stamp_of(file: str) -> str | None:
    """Return what changes when a source does, without a look at texts; None where storage cannot tell."""
    if is_remote(file) or not Path(file).is_dir():
        with open_ranges(file) as opened:
            return opened.stamp
    digest = hashlib.sha256()
    for path in sorted(text_files(Path(file))):
        status = path.stat()
        digest.update(f"{path.relative_to(file)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def read_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    """Yield the rows of one file of an address, in order.

    Raises:
        UserError, StorageError: it cannot be read, or lacks a column; names it.
    """
    if not is_remote(file) and Path(file).is_dir():
        return _folder_rows(Path(file))
    return _tar_rows(address, file) if file.lower().endswith(".tar") else _table_rows(address, file)


def _table_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    with open_table(file) as table:
        require_sound(table)
        key, text = choose_columns(address, table.columns, file)
        for row in table.rows(EVERY_ROW, [key, text]):
            yield _row(row.values.get(key), row.values.get(text)) if row.reject is None else SourceRow(fault=row.reject)


def _row(key: Any, text: Any) -> SourceRow:
    place = "" if key is None or isinstance(key, dict | list) else place_of(key_of_cell(key))
    if not place:
        return SourceRow(fault=NO_KEY)
    try:
        return _placed(place, text_of_cell(text))
    except SampleReject as reject:
        return SourceRow(place=place, fault=reject.reason)


def _placed(place: str, text: str | None) -> SourceRow:
    return SourceRow(place=place, text=text) if text else SourceRow(place=place, fault=NO_TEXT)


def _tar_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    name = address.text_column
    with open_shard(file) as shard:
        for sample in shard.samples:
            place = place_of(sample.key)
            try:
                text = shard.named_text(sample, name) if name is not None else shard.text(sample)
            except SampleReject as reject:
                yield SourceRow(place=place, fault=reject.reason)
                continue
            if text is not None:
                yield _placed(place, text)


def _folder_rows(folder: Path) -> Iterator[SourceRow]:
    files = sorted(text_files(folder))
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="texts") as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            some = files[start : start + FILES_AT_ONCE]
            for path, data in zip(some, pool.map(Path.read_bytes, some), strict=True):
                yield _row(path.relative_to(folder).as_posix(), data)
