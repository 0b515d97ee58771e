"""Tables of Arrow: Parquet, and the IPC files and streams in which Hugging Face's `datasets` keeps its own."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.raw.tables.rows import Rows, TableRow, require_columns
from pipelines.store.files import is_remote, open_binary
from pipelines.store.tables import MEND_USERS, sound_table

ARROW_FILE = b"ARROW1"
MAX_BATCH_ROWS = 16_384
BATCH_BYTES = 64 << 20


class ParquetTable:
    """A Parquet file, read by row groups and in batches of bounded size."""

    fault: str | None = None

    def __init__(self, path: str, *, mend: str = MEND_USERS) -> None:
        self.path, self._mend = path, mend
        with self._open() as file:
            self.columns = column_names(file.schema_arrow)
            self.num_rows: int = file.metadata.num_rows

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        wanted, position = _numbers(rows, self.num_rows), 0
        with self._open() as file:
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                if _any_inside(wanted, position, metadata.num_rows):
                    yield from self._rows_of_group(file, group, wanted, position, columns)
                position += metadata.num_rows

    def _rows_of_group(
        self, file: pq.ParquetFile, group: int, wanted: np.ndarray, position: int, columns: Sequence[str]
    ) -> Iterator[TableRow]:
        metadata = file.metadata.row_group(group)
        bytes_per_row = max(1, _bytes_read(metadata, columns) // max(1, metadata.num_rows))
        batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // bytes_per_row))
        last = wanted[-1]
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=list(columns)):
            yield from _chosen_rows(batch, wanted, position, columns)
            position += batch.num_rows
            if position > last:
                return

    @contextlib.contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with sound_table(self.path, mend=self._mend), open_binary(self.path) as file, pq.ParquetFile(file) as parquet:
            yield parquet


class ArrowTable:
    """An Arrow IPC file or stream; local ones are mapped, not read."""

    fault: str | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        with self._open() as source, _reader(source) as reader:
            self.columns = column_names(reader.schema)

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows; of a remote stream reads it once."""
        return sum(batch.num_rows for batch in self._batches())

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        wanted, position = _numbers(rows, self.num_rows), 0
        for batch in self._batches():
            yield from _chosen_rows(batch, wanted, position, columns)
            position += batch.num_rows
            if not len(wanted) or position > wanted[-1]:
                return

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self._open() as source, _reader(source) as reader:
            if isinstance(reader, pa.RecordBatchFileReader):
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
            else:
                yield from reader

    @contextlib.contextmanager
    def _open(self) -> Iterator[pa.NativeFile]:
        with sound_table(self.path, mend=MEND_USERS):
            if is_remote(self.path):
                with open_binary(self.path) as file, pa.PythonFile(file) as source:
                    yield source
            else:
                with pa.memory_map(self.path.removeprefix("file://")) as source:
                    yield source


def column_names(schema: pa.Schema) -> list[str]:
    """The columns of a table, and the fields of those that are structs as `image.bytes`."""
    names = []
    for field in schema:
        names.append(field.name)
        if pa.types.is_struct(field.type):
            names += [f"{field.name}.{inner.name}" for inner in field.type]
    return names


def _reader(source: pa.NativeFile) -> Any:
    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _numbers(rows: Rows, num_rows: int) -> np.ndarray:
    return np.arange(rows.start, min(rows.stop, num_rows)) if isinstance(rows, range) else rows


def _any_inside(wanted: np.ndarray, position: int, num_rows: int) -> bool:
    begin, end = np.searchsorted(wanted, (position, position + num_rows))
    return bool(begin < end)


def _bytes_read(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    found = (group.column(number) for number in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in found
        if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns)
    )


def _chosen_rows(
    batch: pa.RecordBatch, wanted: np.ndarray, position: int, columns: Sequence[str]
) -> Iterator[TableRow]:
    begin, end = np.searchsorted(wanted, (position, position + batch.num_rows))
    if begin == end:
        return
    numbers = wanted[begin:end]
    inside = numbers - position
    is_run = inside[-1] - inside[0] + 1 == len(inside)
    batch = batch.slice(inside[0], len(inside)) if is_run else batch.take(pa.array(inside))
    cells = [_cells(_column(batch, name)) for name in columns]
    for number, *values in zip(numbers.tolist(), *cells, strict=True):
        yield TableRow(number, dict(zip(columns, values, strict=True)))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer, _, inner = name.partition(".")
    structs = batch.column(outer)
    # Unlike `field`, it knows which structs are missing.
    return structs.flatten()[structs.type.get_field_index(inner)]


def _cells(values: pa.Array) -> list[Any]:
    """A column as Python has it; what is not UTF-8 in it, as in files in the wild, becomes lone surrogates."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        plain = values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values
    if pa.types.is_list(plain.type) or pa.types.is_large_list(plain.type):
        return plain.cast(pa.list_(pa.binary())).to_pylist()
    data = plain.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", errors="surrogateescape") for value in data]
