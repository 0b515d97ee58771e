"""Tables that are text, compressed or not: CSV and plain lines. No row of them is lost in a quoted field."""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, TextIO, cast

import pyarrow as pa

from errors import UserError, describe_unfetched
from pipelines.engine.progress import get_logger
from pipelines.raw.tables.rows import Rows, TableRow, pick, require_columns
from pipelines.raw.texts import BYTE_ORDER_MARKS
from pipelines.store.files import open_binary

LINE_COLUMN = "text"  # of a file of lines
WRONG_NUMBER_OF_FIELDS, UNCLOSED_QUOTE = "wrong_number_of_fields", "unclosed_quote"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
HEAD_BYTES = 64
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# A longer field is a quotation mark that nobody closed. Python's own limit of 131,072 is less than a long text.
MAX_FIELD_CHARACTERS = 1 << 26
# What a key looks like, and the first words of a caption's next line do not.
KEY = re.compile(r"\S*[\d/]\S*")
log = get_logger("tables")


@contextlib.contextmanager
def open_text(path: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a local path or URL as text: unpacked if it is gzip or zstd, decoded by its byte-order mark, else as UTF-8.

    What is not UTF-8 becomes lone surrogates (`surrogateescape`).

    Raises:
        UserError: it is empty, a web page or a pointer, damaged, or cut off; names it.
        MissingFileError, StorageError: as `open_binary`.
    """
    try:
        with open_binary(path) as file, _unpacked(file) as stream:
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            if (fault := describe_unfetched(head)) is not None:
                raise UserError(f"{path} {fault}")
            found = next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")
            encoding = "utf-8-sig" if found == "utf-8" else found.removesuffix("-le").removesuffix("-be")
            errors = "surrogateescape" if found == "utf-8" else "strict"
            with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline) as text:
                yield text
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch or write it again") from None
    except OSError as error:
        if error.errno is not None or isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or cut off ({error}); fetch or write it again") from None
    except UnicodeError as error:
        raise UserError(f"{path} is not in the encoding of its byte-order mark ({error}); write it as UTF-8") from None


@contextlib.contextmanager
def _unpacked(file: BinaryIO) -> Iterator[io.BufferedReader]:
    """The content of a file that may be compressed, which its first bytes say."""
    head = file.read(len(ZSTD))
    file.seek(0)
    if head.startswith(GZIP):
        with gzip.GzipFile(fileobj=file) as stream:
            yield cast(io.BufferedReader, stream)
    elif head == ZSTD:
        with pa.CompressedInputStream(pa.PythonFile(file), "zstd") as stream:
            yield io.BufferedReader(cast(io.RawIOBase, stream))
    else:
        yield cast(io.BufferedReader, file)


class _Swallowed(NamedTuple):
    """What follows a quotation mark that swallows rows: the number of its first line, from 0, and what is wrong."""

    line: int
    fault: str


class CsvTable:
    """A table of comma-separated values with a line of names; semicolons, tabs or bars are known by that line.

    Fields may be quoted, and go over several lines where they are. A row of too many or too few fields is a reject. All
    after a quotation mark that swallows rows is one reject, the last row, with the fields of the line it begins on.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))
        with open_text(path, newline="") as text:
            line = text.readline()
        self._separator = _separator(line)
        # Where a space stands behind each comma, as people type them, it is no part of the next field.
        self._skips_space = f"{self._separator} " in line
        names = next(self._records(), [])
        if isinstance(names, _Swallowed):
            raise UserError(f"{path}: {names.fault}")
        self.columns = [name.strip() for name in names]
        if any("\0" in name for name in self.columns):
            raise UserError(f"{path} has zero bytes, as UTF-16 without a byte-order mark has; write it as UTF-8")
        if self._separator != ",":
            _say_separator(path, self._separator)

    @property
    def num_rows(self) -> int:
        """Number of rows; reads the file once."""
        return self._size_and_fault[0]

    @property
    def fault(self) -> str | None:
        """See `Table`; reads the file once."""
        return self._size_and_fault[1]

    @functools.cached_property
    def _size_and_fault(self) -> tuple[int, str | None]:
        num_rows, fault = -1, None
        for record in self._records():
            num_rows += 1
            fault = record.fault if isinstance(record, _Swallowed) else None
        return num_rows, fault

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        places = [(name, self.columns.index(name)) for name in columns]
        width = len(self.columns)
        records = self._records()
        next(records, None)
        for number, record in pick(records, rows):
            is_swallowed = isinstance(record, _Swallowed)
            fields = self._fields_of_line(record.line) if is_swallowed else record
            if len(fields) == width and not is_swallowed:
                yield TableRow(number, {name: text_cell(fields[place]) for name, place in places})
            else:
                found = {name: text_cell(fields[place]) if place < len(fields) else None for name, place in places}
                yield TableRow(number, found, UNCLOSED_QUOTE if is_swallowed else WRONG_NUMBER_OF_FIELDS)

    def _fields_of_line(self, number: int) -> list[str]:
        """The fields of one line, with quotation marks as text."""
        with open_text(self.path, newline="") as text:
            return next(itertools.islice(text, number, None)).rstrip("\r\n").split(self._separator)

    def _records(self) -> Iterator[list[str] | _Swallowed]:
        """All records, that of names too; where a quotation mark swallows rows, nothing comes after it."""
        line = width = 0
        with open_text(self.path, newline="") as text:
            reader = csv.reader(text, delimiter=self._separator, skipinitialspace=self._skips_space, strict=True)
            try:
                for fields in reader:
                    if reader.line_num > line + 2 and _holds_rows(fields, self._separator, width):
                        fault = f"is closed on line {reader.line_num}, and the lines between are rows; {MEND_QUOTES}"
                        yield _Swallowed(line, f"line {line + 1}: {OPENING_QUOTE} {fault}")
                        return
                    line = reader.line_num
                    if fields:
                        width = width or len(fields)
                        yield fields
            except csv.Error as error:
                yield _Swallowed(line, _describe(error, line + 1, reader.line_num))


OPENING_QUOTE = "the quotation mark that opens a field there"
MEND_QUOTES = "put the whole field in quotation marks, and double those within it"


def _describe(error: csv.Error, first: int, last: int) -> str:
    """What is wrong with the record on the lines from `first` to `last`."""
    reason = str(error)
    if "unexpected end" in reason:
        return f"line {first}: {OPENING_QUOTE} is never closed; {MEND_QUOTES}"
    if "field larger" in reason:
        return (
            f"line {first}: a field has more than {MAX_FIELD_CHARACTERS:,} characters, as where a quotation mark "
            + (f"is not closed; {MEND_QUOTES}")
        )
    if "expected after" in reason:
        where = "there" if first == last else f"on line {last}"
        return f"line {first}: {OPENING_QUOTE} is closed {where} before the field ends; {MEND_QUOTES}"
    return f"line {last}: {reason}"


def _holds_rows(fields: Sequence[str], separator: str, width: int) -> bool:
    """Whether all whole lines inside a field of a record are rows themselves, of as many fields and with keys.

    A caption may well go over several lines; that each has as many commas as a row, and a number or path where the row
    has its own, is what a quotation mark does that was never meant to open a field.
    """
    keys = [place for place, field in enumerate(fields) if KEY.fullmatch(field)]
    for place, field in enumerate(fields):
        inside = field.splitlines()[1:-1]
        places = [key for key in keys if key < place]
        if inside and places and width > 1:
            rows = [line.split(separator) for line in inside]
            if all(len(row) == width and all(KEY.fullmatch(row[key]) for key in places) for row in rows):
                return True
    return False


def _separator(line: str) -> str:
    """What parts the columns of a line of names: a comma if there is one."""
    return next((separator for separator in SEPARATORS if separator in line), ",")


@functools.cache
def _say_separator(path: str, separator: str) -> None:
    """Say it once, however often the table is opened."""
    log.info(f"{path}: its columns are parted by {SEPARATORS[separator]}")


def text_cell(field: str) -> str | bytes:
    """Return a field of a table that is text as a cell."""
    # No text has zero bytes; as bytes it is the reject that other texts with them are.
    return field.encode("utf-8", errors="surrogateescape") if "\0" in field else field


class LinesTable:
    """A file of plain texts, one a line. A blank line is a text of nothing: the next ones keep their numbers."""

    fault: str | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        self.columns = [LINE_COLUMN]

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows; reads the file once."""
        return sum(1 for _ in self._lines())

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        for number, line in pick(self._lines(), rows):
            yield TableRow(number, {name: text_cell(line.rstrip("\n")) for name in columns})

    def _lines(self) -> Iterator[str]:
        with open_text(self.path) as text:
            yield from text
