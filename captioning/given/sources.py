"""The rows of a source of texts, one after the other: tables, tars of texts, and folders of text files."""

import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.given.addresses import ChosenColumns, TextAddress, choose_columns
from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.caption_files import TARS, kind_of_file, say_strays, stray_files, text_files
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import UnreadableShardError
from pipelines.raw.samples import split_at_extension
from pipelines.raw.shards import open_shard
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.places import place_of
from pipelines.raw.tables.rows import key_of_cell
from pipelines.raw.texts import decode_caption
from pipelines.store.files import is_remote, open_ranges

NUM_READERS = 16
FILES_AT_ONCE = 4096
EVERY_ROW = range(sys.maxsize)
NO_KEY, NO_TEXT = "no_key", "no_text"

log = get_logger("captioning")


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
    for path in itertools.chain.from_iterable(text_files(file).values()):
        status = path.stat()
        digest.update(f"{path.relative_to(file)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def read_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    """Yield the rows of one file of an address, in order.

    Raises:
        UserError, StorageError: it cannot be read, or lacks a column; names it.
    """
    if not is_remote(file) and Path(file).is_dir():
        return _folder_rows(address, file)
    try:
        kind = kind_of_file(file)
    except UserError as error:
        raise UserError(f"{address.key}: {error}") from None
    if kind == "lines":
        raise UserError(f"{address.key}: {file} has texts and no keys: name the folder of such files, as FOLDER#txt")
    return _tar_rows(address, file) if kind == TARS else _table_rows(address, file)


def _table_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    with open_table(file) as table:
        require_sound(table)
        chosen = choose_columns(address, table.columns, file)
        for row in table.rows(EVERY_ROW, list(dict.fromkeys((chosen.key, *chosen.texts)))):
            if row.reject is None:
                yield _row(row.values, chosen)
            else:
                yield SourceRow(fault=row.reject)


def _row(values: Mapping[str, Any], chosen: ChosenColumns) -> SourceRow:
    key = values.get(chosen.key)
    place = "" if key is None or isinstance(key, dict | list) else place_of(key_of_cell(key))
    if not place:
        return SourceRow(fault=NO_KEY)
    try:
        return _placed(place, chosen.text_of(values))
    except SampleReject as reject:
        return SourceRow(place=place, fault=reject.reason)


def _placed(place: str, text: str | None) -> SourceRow:
    return SourceRow(place=place, text=text) if text else SourceRow(place=place, fault=NO_TEXT)


def _tar_rows(address: TextAddress, file: str) -> Iterator[SourceRow]:
    name = address.text_column
    try:
        with open_shard(file) as shard:
            if shard.fault is not None:
                log.warning(f"{file}: {shard.fault}")
            for names in (shard.unusable, shard.strays):
                say_strays(log, file, names)
            for sample in shard.samples:
                place = place_of(sample.key)
                try:
                    text = shard.named_text(sample, name) if name is not None else shard.text(sample)
                except SampleReject as reject:
                    yield SourceRow(place=place, fault=reject.reason)
                    continue
                if text is not None:
                    yield _placed(place, text)
    except UnreadableShardError as error:
        raise UserError(f"{address.key}: {error}") from None


def _folder_rows(address: TextAddress, folder: str) -> Iterator[SourceRow]:
    say_strays(log, folder, stray_files(folder))
    named = address.text_column
    found = {
        key: [file for file in files if named is None or _is_called(file, named)]
        for key, files in text_files(folder).items()
    }
    keys = [key for key, files in found.items() if files]
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="texts") as pool:
        for start in range(0, len(keys), FILES_AT_ONCE):
            some = keys[start : start + FILES_AT_ONCE]
            yield from pool.map(_file_row, some, (found[key] for key in some))


def _is_called(file: Path, name: str) -> bool:
    extension = split_at_extension(file.name)[1].lower()
    return name in (extension, extension.partition(".")[0])


def _file_row(key: str, files: Sequence[Path]) -> SourceRow:
    """The row of a key with some files, of which the first that has a text counts, as in a raw shard."""
    place = place_of(key_of_cell(key))
    try:
        text = next(filter(None, (decode_caption(file.read_bytes()) for file in files)), None)
    except SampleReject as reject:
        return SourceRow(place=place, fault=reject.reason)
    return _placed(place, text)
