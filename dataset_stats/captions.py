"""Rows of captions: from this run, raw shards, tables and texts, all giving the same rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipelines.engine.progress import get_logger
from pipelines.raw.caption_files import choose_key_column, key_of_path, say_strays, stray_files, text_files
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import AS_IT_COMES, Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import RawShard, open_shard
from pipelines.raw.tables.arrow_tables import ParquetTable
from pipelines.raw.tables.open_table import TableFormat, open_table
from pipelines.raw.tables.rows import Rows, column_and_place, key_of_cell, pick
from pipelines.raw.tasks import map_ahead
from pipelines.raw.texts import text_members, text_of_value
from pipelines.store.files import is_remote
from pipelines.store.tables import MEND_SHARD

ROWS_PER_BLOCK = 16_384
ADDRESS_SEPARATOR = "#"
WITH_NOUNS = "+nouns"
TEXT_FILES_ALONE = Reading(dialect="generic")  # of a tar, not its JSON
PIPELINE_COLUMN = "caption"  # what captioning wrote
# Columns of the tables that img2dataset writes beside its tars, which list failed downloads too.
IMG2DATASET_COLUMNS = {"key", "status", "error_message"}
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
class RawOpening:
    """How raw shards are opened.

    Attributes:
        reading: what `[data]` says of their samples.
        run: where what is known of them is kept, so that none is looked at anew for each of its pieces.
    """

    reading: Reading = AS_IT_COMES
    run: Path | None = None


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
    """What a worker must know to read a source; travels as the source's path.

    Attributes:
        layout: as in `CaptionSet`, but never "auto".
        column: of texts in files of their own, and of a raw shard's main text, nothing.
        keeps_nouns: whether the counts list the nouns of each caption, so that those of some of them can be told.
    """

    layout: str
    column: str
    path: str
    sample: RowSample | None = None
    keeps_nouns: bool = False

    def __str__(self) -> str:
        sample = self.sample
        drawn = f"{sample.num_chosen}/{sample.num_rows}/{sample.seeds[0]}/{sample.seeds[1]}" if sample else ""
        layout = f"{self.layout}{WITH_NOUNS}" if self.keeps_nouns else self.layout
        return ADDRESS_SEPARATOR.join([layout, drawn, self.column, self.path])

    @property
    def shard(self) -> str:
        """Name of its shard; files of RUN/captions are called after theirs."""
        return Path(self.path).stem if self.layout == "captions" else shard_name(self.path)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read back what `str` gave."""
        layout, drawn, column, path = text.split(ADDRESS_SEPARATOR, 3)
        sample = None
        if drawn:
            num_chosen, num_rows, *seeds = (int(part) for part in drawn.split("/"))
            sample = RowSample(num_rows=num_rows, num_chosen=num_chosen, seeds=(seeds[0], seeds[1]))
        keeps_nouns = layout.endswith(WITH_NOUNS)
        layout = layout.removesuffix(WITH_NOUNS)
        return cls(layout=layout, column=column, path=path, sample=sample, keeps_nouns=keeps_nouns)


def read_rows(address: Address, start: int, stop: int, *, opening: RawOpening) -> Iterator[list[CaptionRow]]:
    """Yield the rows [start, stop) of a source in blocks of bounded size, in order; of a sample, those of the sample.

    Args:
        address: of the source.
        start, stop: numbers of rows.
        opening: of raw shards.

    Raises:
        UserError: the column does not exist, or the file is damaged; names it.
    """
    chosen = range(start, stop) if address.sample is None else address.sample.rows()[start:stop]
    rows = _read(address, chosen, opening)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield block


def read_rows_at(address: Address, numbers: np.ndarray, *, opening: RawOpening) -> Iterator[CaptionRow]:
    """Yield the rows of a source with some numbers, ascending; of a sample, those of the sample.

    Raises:
        UserError: as `read_rows`.
    """
    yield from _read(address, numbers if address.sample is None else address.sample.rows()[numbers], opening)


def count_rows(address: Address) -> int:
    """Number of rows of a file or folder; those of the "captions" and "raw" layouts are known from elsewhere.

    Raises:
        UserError: the column does not exist, or the file is damaged; names it.
    """
    if address.layout != "text":
        with open_table(address.path, cast(TableFormat, address.layout)) as table:
            if table.columns:
                column_and_place(address.path, address.column, table.columns)
            return table.num_rows
    if is_folder(address.path):
        say_strays(log, address.path, stray_files(address.path))
        return len(text_files(address.path))
    with open_shard(address.path) as shard:
        if shard.fault is not None:
            log.warning(f"{address.path}: {shard.fault}")
        for names in (shard.unusable, shard.strays):
            say_strays(log, address.path, names)
        return sum(map(_is_counted, shard.samples))


def is_folder(path: str) -> bool:
    """Whether a path is that of a folder on this machine."""
    return not is_remote(path) and Path(path).is_dir()


def _read(address: Address, rows: Rows, opening: RawOpening) -> Iterator[CaptionRow]:
    readers = {"captions": _read_captions, "raw": functools.partial(_read_raw, opening=opening), "text": _read_texts}
    return readers.get(address.layout, _read_table)(address, rows)


def _read_captions(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    table = ParquetTable(address.path, mend=MEND_SHARD)
    columns = [name for name in ("flags", "reject") if name in table.columns]
    for row in table.rows(rows, list(dict.fromkeys(("key", address.column, *columns)))):
        # Flags are about the caption; the sample's alt text has none.
        flags = (row.values.get("flags") or ()) if address.column == PIPELINE_COLUMN else ()
        caption = _row(row.values["key"], row.values[address.column])
        yield replace(
            caption,
            flags=tuple(flag for flag in flags.split(",") if flag) if isinstance(flags, str) else tuple(flags),
            reject=row.values.get("reject") or caption.reject,
        )


def _read_table(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    with open_table(address.path, cast(TableFormat, address.layout)) as table:
        if not table.columns:
            return
        column, place = column_and_place(address.path, address.column, table.columns)
        key_column = choose_key_column([name for name in table.columns if name != column])
        lists_failures = set(table.columns) >= IMG2DATASET_COLUMNS
        names = [column, key_column, "status" if lists_failures else None]
        for row in table.rows(rows, list(dict.fromkeys(name for name in names if name is not None))):
            key = row.values.get(key_column) if key_column else None
            # As webdataset and folders do, a file's key is its name without what it ends with.
            key = row.number if key is None or key == "" else key_of_path(key) if isinstance(key, str) else key
            if row.reject:
                yield replace(_row(key, row.values[column], place), reject=row.reject)
            elif lists_failures and row.values["status"] != "success":
                yield _rejected(key, key_of_cell(row.values["status"] or "no_status"))
            else:
                yield _row(key, row.values[column], place)


def _row(key: Any, cell: Any, place: int | None = None) -> CaptionRow:
    try:
        return CaptionRow(key=key_of_cell(key), text=text_of_value(cell, place))
    except SampleReject as reject:
        return _rejected(key, reject.reason)


def _rejected(key: Any, reason: str) -> CaptionRow:
    return CaptionRow(key=key_of_cell(key), text=None, reject=reason)


def _read_texts(address: Address, rows: Rows) -> Iterator[CaptionRow]:
    if is_folder(address.path):
        for _, (key, files) in pick(text_files(address.path).items(), rows):
            found = (_row(key, file.read_bytes()) for file in files)
            yield next((row for row in found if row.text or row.reject), CaptionRow(key=key_of_cell(key), text=""))
        return
    with open_shard(address.path, TEXT_FILES_ALONE) as shard:
        for _, sample in pick(filter(_is_counted, shard.samples), rows):
            if sample.reject == "cut_off":
                yield _rejected(sample.key, sample.reject)
                continue
            try:
                yield _row(sample.key, shard.text(sample))
            except SampleReject as reject:
                yield _rejected(sample.key, reject.reason)


def _is_counted(sample: RawSample) -> bool:
    """Whether a sample of a tar has a text, or an image that should have one."""
    return sample.image_extension is not None or bool(text_members(list(sample.members), sample.image_extension))


def _read_raw(address: Address, rows: Rows, *, opening: RawOpening) -> Iterator[CaptionRow]:
    with open_shard(address.path, opening.reading, run=opening.run) as shard:
        samples = (sample for _, sample in pick(shard.samples, rows))
        read = functools.partial(_raw_row, shard, column=address.column)
        yield from map_ahead(read, samples) if is_remote(address.path) else map(read, samples)


def _raw_row(shard: RawShard, sample: RawSample, *, column: str) -> CaptionRow:
    if sample.reject:
        return _rejected(sample.key, sample.reject)
    try:
        return _row(sample.key, shard.named_text(sample, column) if column else shard.text(sample))
    except SampleReject as reject:
        return _rejected(sample.key, reject.reason)
