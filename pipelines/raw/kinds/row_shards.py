"""Rows of Parquet or Arrow with the image in a column as a raw shard, read by row in bounded memory."""

import bisect
import contextlib
import hashlib
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.raw.images import SampleReject
from pipelines.raw.kinds.folder_shards import MISSING_IMAGE_FILE
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shard_headers import ShardHeaders, summary_of_rows
from pipelines.raw.shard_names import shard_name
from pipelines.raw.tables.arrow_tables import ARROW_FILE
from pipelines.raw.tables.column_names import TEXT_NAMES
from pipelines.raw.tables.image_columns import ImageColumn, image_column
from pipelines.raw.tables.open_table import PARQUET, open_table
from pipelines.raw.tables.row_texts import RowTexts, row_keys
from pipelines.raw.tasks import no_garbage
from pipelines.store.files import RangeFile, is_remote, open_binary
from pipelines.store.tables import MEND_USERS, sound_table

# Rows are decoded so many bytes at a time; those that threads which read ahead may still ask for are kept.
BATCH_BYTES = 8 << 20
KEPT_BYTES = 128 << 20
MAX_BATCH_ROWS = 1024
MAX_SKIPPED_ROWS = 256
BUFFER_BYTES = 1 << 20
# Of the identity: the end of each column of images, all of those that may be texts, and of others up to this.
TAIL_BYTES = 512
MAX_COLUMN_BYTES = 4 << 20
STEP_BYTES = 64 << 10
LOWER_TEXT_NAMES = frozenset(map(str.lower, TEXT_NAMES))


class ImageCells(Protocol):
    """The column of images of an open file."""

    num_rows: int

    def cell(self, row: int) -> tuple[bytes | None, str | None]:
        """Return bytes and path of a row, from any thread."""
        ...


def images_in(path: str, file: RangeFile, reading: Reading) -> ImageColumn | None:
    """Return the column with images of a Parquet or Arrow file, or None if none has bytes; raises `UserError`."""
    with sound_table(path, mend=MEND_USERS), _source(path) as source:
        if file.read(0, len(PARQUET)) == PARQUET:
            with pq.ParquetFile(source) as parquet:
                column = image_column(parquet.schema_arrow, reading, where=path)
                return column if column is not None and _has_bytes(parquet, column) else None
        with _arrow_reader(source) as reader:
            return image_column(reader.schema, reading, where=path)


@no_garbage()
def read_row_headers(path: str, file: RangeFile, column: ImageColumn, reading: Reading) -> ShardHeaders:
    """Find the samples of a file with images in `column`: one for each row.

    Raises:
        UserError: it cannot be read; names it.
    """
    path_field = f"{column.name}.path" if column.has_path else None
    with open_table(path) as table:
        keys, rejects = row_keys(table, shard_name(path), path_column=path_field)
    texts = RowTexts([path])
    samples = [
        RawSample(key, reject=reject, row=row) for row, (key, reject) in enumerate(zip(keys, rejects, strict=True))
    ]
    summary = summary_of_rows(
        samples, texts, kind="rows", stamp=file.stamp, identity=_identity(path, file, column), reading=reading
    )
    return ShardHeaders(summary=summary, samples=samples)


@contextlib.contextmanager
def open_rows(path: str, file: RangeFile, headers: ShardHeaders, reading: Reading) -> Iterator["RowShard"]:
    """Open a file whose headers are known as a shard of rows; raises `UserError` if it is damaged."""
    with sound_table(path, mend=MEND_USERS), _source(path) as source:
        if file.read(0, len(PARQUET)) == PARQUET:
            with pq.ParquetFile(source, buffer_size=BUFFER_BYTES if is_remote(path) else 0) as parquet:
                column = image_column(parquet.schema_arrow, reading, where=path)
                assert column is not None, f"{path}: its headers tell of images"
                yield RowShard(path, _ParquetCells(parquet, column), headers, reading)
        else:
            with _arrow_reader(source) as reader:
                column = image_column(reader.schema, reading, where=path)
                assert column is not None, f"{path}: its headers tell of images"
                yield RowShard(path, _ArrowCells(reader, column), headers, reading)


class RowShard:
    """A `RawShard` of rows."""

    def __init__(self, path: str, cells: ImageCells, headers: ShardHeaders, reading: Reading) -> None:
        summary = headers.summary
        self.path = path
        self.name = shard_name(path)
        self.samples: Sequence[RawSample] = headers.samples
        self.identity = summary.identity
        self.unusable: Sequence[str] = summary.unusable
        self.strays: Sequence[str] = summary.strays
        self.fault = summary.fault
        self.has_labels = summary.has_labels
        self._cells, self._reading, self._texts = cells, reading, RowTexts([path])

    @property
    def columns(self) -> Sequence[str]:
        """See `RawShard`."""
        return self._texts.columns

    def image_bytes(self, sample: RawSample) -> bytes:
        """See `RawShard`: those of the row, or where it has none of the file that it names."""
        assert sample.row is not None, f"{self.name}: {sample.key} is no row"
        data, name = self._cells.cell(sample.row)
        if data is not None:
            return data
        if not name:
            raise SampleReject("no_image")
        if is_remote(self.path) or "://" in name:
            raise SampleReject(MISSING_IMAGE_FILE, name)
        try:
            return (Path(self.path.removeprefix("file://")).parent / name).read_bytes()
        except (OSError, ValueError) as error:
            raise SampleReject(MISSING_IMAGE_FILE, str(error)) from None

    def image_start(self, sample: RawSample, num_bytes: int) -> bytes:
        """See `RawShard`: all of it, as it is in memory anyway."""
        return self.image_bytes(sample)

    def text(self, sample: RawSample) -> str | None:
        """See `RawShard`."""
        assert sample.row is not None, f"{self.name}: {sample.key} is no row"
        if self._reading.dialect == "sa1b":
            return None
        return self._texts.text(sample.row, self._reading.text_column)

    def alt_text(self, sample: RawSample) -> str | None:
        """See `RawShard`."""
        try:
            return self.text(sample)
        except SampleReject:
            return None

    def named_text(self, sample: RawSample, name: str) -> str | None:
        """See `RawShard`."""
        assert sample.row is not None, f"{self.name}: {sample.key} is no row"
        return self._texts.named_text(sample.row, name)

    def text_names(self, sample: RawSample) -> list[str]:
        """See `RawShard`."""
        return self._texts.text_columns

    def label(self, sample: RawSample) -> int | None:
        """See `RawShard`: the column `label`."""
        assert sample.row is not None, f"{self.name}: {sample.key} is no row"
        return self._texts.label(sample.row)


class _ParquetCells:
    """The images of a Parquet file, decoded in order in batches, of which the last ones are kept.

    Row groups may have gigabytes, and a row is found only behind those before it in its group. So rows that are asked
    for nearly in order, as by threads that read ahead, are decoded once.
    """

    def __init__(self, file: pq.ParquetFile, column: ImageColumn) -> None:
        self._file, self._column = file, column
        self.num_rows: int = file.metadata.num_rows
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = [sum(sizes[:group]) for group in range(len(sizes))]
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._position = 0  # of the row after the last batch
        self._kept: deque[tuple[int, pa.Array]] = deque()
        self._lock = threading.Lock()

    def cell(self, row: int) -> tuple[bytes | None, str | None]:
        """See `ImageCells`."""
        with self._lock:
            values, place = self._find(row)
        return _cell(values, place, self._column)

    def _find(self, row: int) -> tuple[pa.Array, int]:
        for start, values in reversed(self._kept):
            if start <= row < start + len(values):
                return values, row - start
        group = bisect.bisect_right(self._starts, row) - 1
        if row < self._position or self._starts[group] > self._position + MAX_SKIPPED_ROWS or self._batches is None:
            self._begin(group)
        assert self._batches is not None, "begun"
        while True:
            values = next(self._batches).column(0)
            start, self._position = self._position, self._position + len(values)
            self._kept.append((start, values))
            while len(self._kept) > 2 and sum(kept.nbytes for _, kept in self._kept) > KEPT_BYTES:
                self._kept.popleft()
            if self._position > row:
                return values, row - start

    def _begin(self, group: int) -> None:
        metadata = self._file.metadata.row_group(group)
        bytes_per_row = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // bytes_per_row))
        groups = list(range(group, self._file.num_row_groups))
        self._batches = self._file.iter_batches(
            batch_rows, row_groups=groups, columns=[self._column.name], use_threads=False
        )
        self._position = self._starts[group]


class _ArrowCells:
    """The images of an Arrow file or stream, mapped."""

    def __init__(self, reader: Any, column: ImageColumn) -> None:
        self._column = column
        self._chunks: list[pa.Array] = reader.read_all().column(column.name).chunks
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))
        self.num_rows = self._starts[-1]

    def cell(self, row: int) -> tuple[bytes | None, str | None]:
        """See `ImageCells`."""
        chunk = bisect.bisect_right(self._starts, row) - 1
        return _cell(self._chunks[chunk], row - self._starts[chunk], self._column)


def _cell(values: pa.Array, place: int, column: ImageColumn) -> tuple[bytes | None, str | None]:
    scalar = cast(Any, values[place])
    if not scalar.is_valid:
        return None, None
    if not column.is_struct:
        return scalar.as_py(), None
    return scalar["bytes"].as_py(), scalar["path"].as_py() if column.has_path else None


@contextlib.contextmanager
def _source(path: str) -> Iterator[Any]:
    if is_remote(path):
        with open_binary(path) as file, pa.PythonFile(file) as source:
            yield source
    else:
        with pa.memory_map(path.removeprefix("file://")) as source:
            yield source


def _arrow_reader(source: Any) -> Any:
    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _has_bytes(parquet: pq.ParquetFile, column: ImageColumn) -> bool:
    """Whether some row may have bytes, as far as the file's statistics tell: a column may have paths alone."""
    leaf = f"{column.name}.bytes" if column.is_struct else column.name
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        for number in range(metadata.num_columns):
            chunk = metadata.column(number)
            if chunk.path_in_schema == leaf and (
                chunk.statistics is None
                or not chunk.statistics.has_null_count
                or chunk.statistics.null_count < metadata.num_rows
            ):
                return True
    return not column.has_path


def _identity(path: str, file: RangeFile, column: ImageColumn) -> str:
    """Return a digest that differs when a row does: of the footer, of all texts, and of parts of the images."""
    digest = hashlib.sha256(f"{file.size} {column.name}".encode())
    if file.read(0, len(PARQUET)) != PARQUET:
        for start in range(0, file.size, STEP_BYTES):
            digest.update(file.read(start, TAIL_BYTES))
        digest.update(file.read(max(0, file.size - STEP_BYTES), STEP_BYTES))
        _add_arrow_texts(digest, path, column)
        return digest.hexdigest()
    footer_bytes = int.from_bytes(file.read(file.size - 8, 4), "little")
    if footer_bytes > file.size - 12:
        raise UserError(f"{path} is damaged: its footer is longer than the file")
    digest.update(file.read(file.size - 8 - footer_bytes, footer_bytes))
    with _source(path) as source, pq.ParquetFile(source) as parquet:
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            for number in range(metadata.num_columns):
                chunk = metadata.column(number)
                end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
                size = min(chunk.total_compressed_size, _num_hashed(parquet.schema.column(number), column))
                for start in range(end - size, end, MAX_COLUMN_BYTES):
                    digest.update(file.read(start, min(MAX_COLUMN_BYTES, end - start)))
    return digest.hexdigest()


def _num_hashed(leaf: Any, column: ImageColumn) -> int:
    """Return how many bytes at the end of a column of Parquet are part of the identity, in each row group."""
    if leaf.path in (column.name, f"{column.name}.bytes"):
        return TAIL_BYTES
    is_text = leaf.logical_type.type in ("STRING", "JSON") or leaf.path.partition(".")[0].lower() in LOWER_TEXT_NAMES
    return sys.maxsize if is_text else MAX_COLUMN_BYTES


def _add_arrow_texts(digest: Any, path: str, column: ImageColumn) -> None:
    with sound_table(path, mend=MEND_USERS), _source(path) as source, _arrow_reader(source) as reader:
        names = [
            field.name
            for field in reader.schema
            if field.name != column.name and (field.name.lower() in LOWER_TEXT_NAMES or _holds_text(field.type))
        ]
        for batch in reader.read_all().select(names).to_batches(MAX_BATCH_ROWS):
            content = pa.BufferOutputStream()
            with pa.ipc.new_stream(content, batch.schema) as stream:
                stream.write_batch(batch)
            digest.update(content.getvalue())


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_text(field.type) for field in kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
