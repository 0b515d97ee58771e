"""Columns of files of captions: what a set of Parquet files may choose by, as LAION's `similarity` and `punsafe`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.columns.columns_folders import MAIN_CAPTION
from pipelines.columns.expressions import Expression, Kind
from pipelines.columns.sample_columns import SampleColumns
from pipelines.store.files import open_binary
from pipelines.store.tables import MEND_USERS, sound_table

KEY = "key"


class FileColumns(SampleColumns):
    """The columns of Parquet files as those of samples: a shard is a file, by its path, and a sample a row."""

    def check(self, expression: Expression, wants: Kind, *, shards: Iterable[str], caption: str = MAIN_CAPTION) -> None:
        """Find, before anything runs, whether an expression can be evaluated for all of the files.

        Raises:
            UserError: a file lacks a column, or types do not fit; names the key, and the file.
        """
        for path in shards:
            with sound_table(path, mend=MEND_USERS), open_binary(path) as file:
                schema = pq.read_schema(file)
            if missing := [name for name in expression.names if name not in schema.names]:
                near = did_you_mean(missing[0], schema.names)
                raise UserError(f"{expression.key}: {path} has no column {missing[0]!r}{near}")
            expression.check(schema, wants)

    def read(self, shard: str, names: Sequence[str], *, caption: str = MAIN_CAPTION) -> pa.Table:
        """Return the columns of `names` of a file; it has rows where samples have keys, so `key` may be null."""
        with sound_table(shard, mend=MEND_USERS), open_binary(shard) as file:
            table = pq.read_table(file, columns=list(names))
            num_rows = pq.read_metadata(file).num_rows
        if KEY not in names:
            table = table.append_column(KEY, pa.chunked_array([pa.nulls(num_rows, pa.string())]))
        return table

    def hashes(self, shard: str, names: Sequence[str], *, caption: str = MAIN_CAPTION) -> dict[str, str]:
        """Nothing more: which file it is decides the source, too."""
        return {}
