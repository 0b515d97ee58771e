"""Tables of the user's, of any format and from anywhere, read as rows by one reader."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from errors import UserError, describe_unfetched
from pipelines.raw.tables.arrow_tables import ARROW_FILE, ArrowTable, ParquetTable
from pipelines.raw.tables.json_tables import JsonLinesTable, JsonTable, begins_as_lines
from pipelines.raw.tables.tab_tables import TabTable
from pipelines.raw.tables.text_tables import CsvTable, LinesTable, open_text
from pipelines.store.files import open_binary

TableFormat = Literal["parquet", "arrow", "csv", "tsv", "jsonl", "json", "lines"]
FORMATS: dict[str, TableFormat] = {
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "txt": "lines",
}
COMPRESSIONS = ("gz", "zst")
COMPRESSIBLE = ("csv", "tsv", "tab", "jsonl", "ndjson", "json", "txt")
TABLES = (
    "CSV, TSV, JSON, JSON lines or lines of text (.csv .tsv .json .jsonl .txt, also with .gz or .zst), "
    "or Parquet or Arrow (.parquet .arrow)"
)
PARQUET = b"PAR1"
ARROW_STREAM = b"\xff\xff\xff\xff"


# Each has `path`; `columns`, with the fields of structs and objects in them as `image.bytes`; `num_rows`, for which a
# format that does not say it is read once; `fault`, what is wrong with the table as a whole, such as a quotation mark
# that is never closed, or None; and `rows(numbers, columns)`: the rows of ascending numbers in the memory of a part of
# the file. That raises UserError if a column is not there or is there twice, or if the file is damaged; of a table with
# a fault it gives the sound rows, and a reject for what cannot be told apart.
Table = ParquetTable | ArrowTable | CsvTable | TabTable | LinesTable | JsonLinesTable | JsonTable


def table_format(path: str) -> TableFormat | None:
    """Return the format that a path or URL ends with, or None if it is not the name of a table."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    stem, dot, extension = path.lower().rpartition(".")
    if extension in COMPRESSIONS:
        _, dot, extension = stem.rpartition(".")
        return FORMATS[extension] if dot and extension in COMPRESSIBLE else None
    return FORMATS.get(extension) if dot else None


@contextlib.contextmanager
def open_table(path: str, table_format: TableFormat | None = None) -> Iterator[Table]:
    """Open a table, local or remote: Parquet, Arrow, CSV, TSV, JSON lines, a JSON document, or lines of text.

    Args:
        table_format: what it is, if its name does not say it. Parquet and Arrow are known by their first bytes.

    Raises:
        UserError: it is none of them, is empty, damaged, cut off, or was never fetched; names it.
        MissingFileError, StorageError: as `open_binary`.
    """
    yield _open(path, table_format)


def require_sound(table: Table) -> None:
    """Refuse a table with a fault, before anything is made of a part of it.

    Raises:
        UserError: it has one; names the file, the line and what to do.
    """
    if table.fault is not None:
        raise UserError(f"{table.path}: {table.fault}")


def _open(path: str, given: TableFormat | None) -> Table:
    with open_binary(path) as file:
        head = file.read(64)
    if (fault := describe_unfetched(head)) is not None:
        raise UserError(f"{path} {fault}")
    if head.startswith(PARQUET):
        return ParquetTable(path)
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return ArrowTable(path)
    match given or table_format(path):
        case "parquet" | "arrow":
            raise UserError(f"{path} is neither Parquet nor Arrow: fetch or write it again")
        case "csv":
            return CsvTable(path)
        case "tsv":
            return TabTable(path)
        case "lines":
            return LinesTable(path)
        case "json" | "jsonl" as kind:
            return _open_json(path, kind)
        case None:
            raise UserError(f"{path} is not called as a table is: {TABLES}")


def _open_json(path: str, kind: str) -> Table:
    with open_text(path) as text:
        # What is called one of the two is often the other.
        start = text.read(1 << 10).lstrip()[:1]
    if start == "[":
        return JsonTable(path)
    if kind == "jsonl":
        return JsonLinesTable(path)
    with open_text(path) as text:
        is_lines = begins_as_lines(text)
    return JsonLinesTable(path) if is_lines else JsonTable(path)
