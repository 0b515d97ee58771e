"""The captions a text job encodes, and their identity: what of them decides the embeddings, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.columns.caption_columns import CaptionColumn, RunCaptions, mend_captions
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, discard, sha256_file, sha256_text
from pipelines.store.state_files import read_state, state_of
from pipelines.store.tables import read_table, sound_table

Row = dict[str, Any]
# In a directory of text features: the identity of each shard's captions, and the Parquet file it was taken from.
IDENTITIES_NAME = ".captions.json"
NUM_READERS = 8

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class CaptionPlaces:
    """Where the captions of a table lie: by the name of each column, in order, its folder and its name in the files."""

    columns: Mapping[str, tuple[Path, str]]

    @classmethod
    def find(cls, captions: RunCaptions, columns: Sequence[str], *, key: str) -> Self:
        """Return those of a run; raises as `RunCaptions.find` does, which blames `key` of the recipe."""
        found = [captions.find(name, key=key) for name in columns]
        return cls(columns={column.name: (column.folder.absolute(), column.column) for column in found})

    def by_folder(self) -> dict[Path, list[str]]:
        """Return, by folder, what the columns are called in its files."""
        found: dict[Path, list[str]] = {}
        for folder, column in self.columns.values():
            found.setdefault(folder, []).append(column)
        return found

    def read(self, shard: str, start: int = 0, *, stop: int | None = None) -> list[Row]:
        """Return a row for each sample of [start, stop): its `key`, and by the name of each column text and reject.

        Raises:
            UserError: a file is not there or damaged, or two are not of the same samples; names it.
        """
        tables = {
            folder: read_table(folder / f"{shard}.parquet", ["key", *columns, "reject"], mend=mend_captions())
            for folder, columns in self.by_folder().items()
        }
        tables = {
            folder: table.slice(start, None if stop is None else stop - start) for folder, table in tables.items()
        }
        first, *others = tables
        for folder in others:
            if not tables[folder]["key"].equals(tables[first]["key"]):
                raise UserError(
                    f"{folder / shard}.parquet has other samples than {first / shard}.parquet: {mend_captions()}"
                )
        lists = {
            name: zip(tables[folder][column].to_pylist(), tables[folder]["reject"].to_pylist(), strict=True)
            for name, (folder, column) in self.columns.items()
        }
        keys = tables[first]["key"].to_pylist()
        return [
            {"key": key, **dict(zip(lists, cells, strict=True))}
            for key, *cells in zip(keys, *lists.values(), strict=True)
        ]

    def identity(self, shard: str) -> str:
        """Return a hash over what the columns give a text encoder; raises as `text_identity` does."""
        found = {
            folder: text_identity(folder / f"{shard}.parquet", columns) for folder, columns in self.by_folder().items()
        }
        if len(found) == 1:
            return next(iter(found.values()))
        # Where they lie decides nothing; in which order does, as that of captions in the features.
        return sha256_text(json.dumps([[column, found[folder]] for folder, column in self.columns.values()]))


def caption_sources(
    captions: RunCaptions, raw: Sequence[Source], places: CaptionPlaces, *, directory: Path
) -> list[Source]:
    """Describe the captions of raw shards as sources of a text job that writes `directory`.

    A source's identity is a hash over keys, the texts of the columns and who is rejected: new flags, or thresholds that
    reject nobody else, leave the embeddings as they are. It is read anew only where a Parquet file has changed.

    Raises:
        UserError: a shard has no captions, they were made from another tar than the one there is now, or a column is
            missing; names shard and field.
    """
    known = _read_identities(directory)
    columns = captions.folders(list(places.columns))
    for column in columns:
        captions.require_shards(column, raw)

    def describe(shard: Source) -> Source:
        file, identity = known.get(shard.name, ("", ""))
        if file != files_of(columns, shard.name):
            identity = places.identity(shard.name)
        num_samples = columns[0].manifest.shards[shard.name].num_read
        return Source(
            name=shard.name, path=str(columns[0].file(shard.name)), identity=identity, num_samples=num_samples
        )

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(describe, raw))


def files_of(columns: Sequence[CaptionColumn], shard: str) -> str:
    """Return what the files of a shard's captions are known by, as their manifests have it."""
    return "+".join(column.sha256(shard) for column in columns)


def text_identity(path: Path, columns: Sequence[str]) -> str:
    """Return a hash over what `columns` of a captions file give a text encoder.

    Raises:
        UserError: the file is no Parquet, or lacks a column of texts; names both.
    """
    wanted = ["key", *columns, "reject"]
    with sound_table(path, mend=mend_captions()):
        schema = pq.read_schema(path)
        for column in wanted:
            position = schema.get_field_index(column)
            if position < 0 or not pa.types.is_string(schema.field(position).type):
                raise UserError(f"{path}: there is no column {column!r} of texts; {mend_captions()}")
        table = pq.read_table(path, columns=wanted)
    return sha256_text(json.dumps([table.column(column).to_pylist() for column in wanted], ensure_ascii=False))


def require_unchanged(shard: str, columns: Sequence[CaptionColumn]) -> None:
    """Check that captions files are those that their manifests describe.

    Raises:
        UserError: one is not; names the file and both hashes.
    """
    for column in columns:
        path, expected = column.file(shard), column.sha256(shard)
        if (found := sha256_file(path)) != expected:
            raise UserError(
                f"{path} has SHA-256 {found}, but by its manifest {expected}: it has changed; {mend_captions()}"
            )


def remember_identities(sources: Sequence[Source], columns: Sequence[CaptionColumn], *, directory: Path) -> None:
    """Keep what `caption_sources` found out, so that the next command need not read the captions."""
    known = _read_identities(directory)
    found = {source.name: [files_of(columns, source.name), source.identity] for source in sources}
    if known | found != known:
        atomic_write_json(directory / IDENTITIES_NAME, known | found)


def _read_identities(directory: Path) -> dict[str, list[str]]:
    path, mend = directory / IDENTITIES_NAME, "the captions are read again"
    if not path.is_file():
        return {}
    try:
        return state_of(dict[str, list[str]], read_state(path, mend=mend), where=str(path), mend=mend)
    except UserError as error:
        log.warning(str(error))
        discard(path)
        return {}
