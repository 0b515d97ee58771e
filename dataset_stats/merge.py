"""Adds up the noun counts of many shards with bounded memory: sorted files in, one sorted file out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_stats.example_places import in_set, noun_masks
from pipelines.store.files import atomic_file, discard, discard_folder, own_files, remove_temporary_files
from pipelines.store.tables import MEND_SHARD, sound_table

ROWS_PER_BATCH = 65_536
MAX_OPEN_FILES = 32
SCRATCH_NAME = re.compile(r"(nouns|set-\d+-\d+-\d+|chosen-\d+-\d+)\.parquet")


def merge_counts(sets: Mapping[str, Sequence[Path]], output: Path, *, scratch: Path) -> None:
    """Write one row per noun with its count and an example's place in every set, sorted by noun.

    Args:
        sets: set name -> the noun files of its shards (`NOUN_SCHEMA`, sorted by noun).
        output: Parquet with columns noun, `<set>` (occurrences) and `<set> example` (shard number << 32 | row,
            renumbered as `example_places` does, null where the noun does not occur).
        scratch: folder for files between the levels of the merge; `clear_scratch` removes them.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    runs = []
    for position, (name, paths) in enumerate(sets.items()):
        sources = [_Run(path, shard=shard, columns=(name,)) for shard, path in enumerate(paths)]
        runs.append(_merge_levels(sources, (name,), scratch / f"set-{position}"))
    _write_run(runs, tuple(sets), output)


def chosen_file(scratch: Path, position: int, shard: int) -> Path:
    """Where the nouns are kept, in between, that some rows of a shard have, for the set at a position."""
    return scratch / f"chosen-{position}-{shard}.parquet"


def clear_scratch(scratch: Path) -> None:
    """Remove the files between the levels of a merge, those of a killed run too; what else is there stays."""
    remove_temporary_files(scratch, is_held=True)
    for path in own_files(scratch, SCRATCH_NAME):
        discard(path)
    discard_folder(scratch)


class _Run:
    """A sorted file that is read in batches."""

    def __init__(self, path: Path, *, columns: tuple[str, ...], shard: int | None = None) -> None:
        self._path = path
        self._columns = columns
        self._shard = shard

    def batches(self) -> Iterator[pa.Table]:
        with sound_table(self._path, mend=MEND_SHARD), pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
                yield self._with_shard(pa.Table.from_batches([batch]))

    def _with_shard(self, table: pa.Table) -> pa.Table:
        if self._shard is None:
            return table
        masks = noun_masks(table["noun"].to_numpy())
        examples = in_set(table["example"].to_numpy(), masks, shard=self._shard)
        return pa.table([table["noun"], table["count"], examples], schema=_schema(self._columns))


def _schema(columns: Sequence[str]) -> pa.Schema:
    fields = [pa.field("noun", pa.string())]
    for name in columns:
        fields += [pa.field(name, pa.int64()), pa.field(f"{name} example", pa.int64())]
    return pa.schema(fields)


def _merge_levels(runs: list[_Run], columns: tuple[str, ...], prefix: Path) -> _Run:
    level = 0
    while len(runs) > 1 or level == 0:
        groups = [runs[start : start + MAX_OPEN_FILES] for start in range(0, len(runs), MAX_OPEN_FILES)]
        merged = []
        for number, group in enumerate(groups):
            path = prefix.with_name(f"{prefix.name}-{level}-{number}.parquet")
            _write_run(group, columns, path)
            merged.append(_Run(path, columns=columns))
        runs, level = merged, level + 1
    return runs[0]


def _write_run(runs: Sequence[_Run], columns: tuple[str, ...], path: Path) -> None:
    schema = _schema(columns)
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in _merged_batches(runs, schema):
            writer.write_table(table)


def _merged_batches(runs: Sequence[_Run], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield sorted tables of summed rows: up to the smallest of the runs' last nouns, everything is in memory."""
    readers = [run.batches() for run in runs]
    empty = schema.empty_table()
    heads: list[pa.Table | None] = [next(reader, None) for reader in readers]
    while any(head is not None for head in heads):
        bound = min(head["noun"][-1].as_py() for head in heads if head is not None)
        ready = [empty]
        for index, head in enumerate(heads):
            if head is None:
                continue
            num_ready = len(head.filter(pc.field("noun") <= bound))
            ready.append(_widen(head.slice(0, num_ready), schema))
            rest = head.slice(num_ready)
            heads[index] = rest if len(rest) else next(readers[index], None)
        yield _sum_rows(pa.concat_tables(ready), schema)


def _widen(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [table[name] if name in table.column_names else pa.nulls(len(table), pa.int64()) for name in schema.names]
    return pa.table(columns, schema=schema)


def _sum_rows(table: pa.Table, schema: pa.Schema) -> pa.Table:
    how = [(name, "min" if name.endswith(" example") else "sum") for name in schema.names[1:]]
    summed = table.group_by("noun", use_threads=False).aggregate(how)
    summed = summed.select(["noun", *(f"{name}_{function}" for name, function in how)]).rename_columns(schema.names)
    return summed.sort_by("noun")
