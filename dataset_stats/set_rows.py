"""The rows of a set among those that were counted: all of them, or those that its `where` keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_stats.counting import NOUN_SCHEMA, sum_nouns
from dataset_stats.example_places import ROW_MASK, noun_masks
from pipelines.store.files import atomic_file
from pipelines.store.tables import MEND_SHARD, read_table, read_table_schema, sound_table

NOUNS_COLUMN = "nouns"
ROWS_PER_BATCH = 65_536


@dataclass(frozen=True, kw_only=True)
class SetRows:
    """The caption files of a set's shards, in order, and which of their rows are the set's.

    Attributes:
        chosen: of the number of a shard the rows of its file that are the set's, bool [num_rows]; None: all are.
    """

    files: Sequence[Path]
    chosen: Callable[[int], np.ndarray] | None = None

    def column_names(self, shard: int) -> list[str]:
        """Return the columns of a shard's file."""
        return read_table_schema(self.files[shard], mend=MEND_SHARD).names

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the set's rows of a shard, or some columns of them; raises as `read_table`."""
        table = read_table(self.files[shard], columns, mend=MEND_SHARD)
        return table if self.chosen is None else table.filter(pa.array(self.chosen(shard)))

    def numbers(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Return the numbers in the file of some rows that `read` returned."""
        return rows if self.chosen is None else np.flatnonzero(self.chosen(shard))[rows]

    def write_nouns(self, shard: int, path: Path) -> None:
        """Write the nouns of the set's rows of a shard, as `NOUN_SCHEMA`; the rows must list their nouns."""
        assert self.chosen is not None, "the nouns of all rows are counted by the workers"
        chosen, tables, first = self.chosen(shard), [NOUN_SCHEMA.empty_table()], 0
        with sound_table(self.files[shard], mend=MEND_SHARD), pq.ParquetFile(self.files[shard]) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[NOUNS_COLUMN]):
                tables.append(_count(batch.column(0), chosen[first : first + len(batch)], first_row=first))
                first += len(batch)
        with atomic_file(path) as temporary:
            pq.write_table(sum_nouns(tables), temporary, compression="zstd")


def _count(lists: pa.Array, chosen: np.ndarray, *, first_row: int) -> pa.Table:
    """Count the nouns of chosen rows; examples are renumbered as `example_places` tells."""
    rows = np.flatnonzero(chosen)
    lists = lists.take(pa.array(rows))
    nouns = lists.flatten().dictionary_encode()
    owners = rows[lists.value_parent_indices().to_numpy()] + first_row
    codes = nouns.indices.to_numpy()
    words = nouns.dictionary
    if not len(words):
        return NOUN_SCHEMA.empty_table()
    masks = noun_masks(words.to_numpy(zero_copy_only=False)) & ROW_MASK
    examples = np.full(len(words), np.iinfo(np.int64).max)
    np.minimum.at(examples, codes, owners ^ masks[codes])
    return pa.table([words, np.bincount(codes, minlength=len(words)), examples], schema=NOUN_SCHEMA)
