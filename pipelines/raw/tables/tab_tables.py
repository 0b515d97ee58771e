"""Tables of tab-separated values: a row is a line, but where a field in quotation marks holds tabs or line breaks."""

import csv
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TextIO

from pipelines.raw.tables.rows import Rows, TableRow, pick, require_columns
from pipelines.raw.tables.text_tables import KEY, UNCLOSED_QUOTE, WRONG_NUMBER_OF_FIELDS, open_text, text_cell

# A caption has fewer lines: what goes on for longer is a quotation mark that was text.
MAX_LINES_OF_FIELD = 1000


class TabTable:
    """A table of tab-separated values with a line of names.

    Quotation marks are text, but for those around a whole field, which may hold tabs and line breaks if the row then
    has its number of fields. A row of too many or too few fields is a reject, and so is one whose last field opens a
    quotation mark that is not closed, where the line behind it is no row.
    """

    fault: str | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        with open_text(path) as text:
            self.columns = [name.strip() for name in _fields_of_line(text.readline())]

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows; reads the file once."""
        return sum(1 for _ in self._records())

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        places = [(name, self.columns.index(name)) for name in columns]
        for number, (fields, reject) in pick(self._records(), rows):
            found = {name: text_cell(fields[place]) if place < len(fields) else None for name, place in places}
            wrong_number = None if len(fields) == len(self.columns) else WRONG_NUMBER_OF_FIELDS
            yield TableRow(number, found, reject or wrong_number)

    def _records(self) -> Iterator[tuple[list[str], str | None]]:
        """The fields of each row, and what is wrong with it."""
        with open_text(self.path) as text:
            next(text, None)
            lines = _Lines(text)
            while line := lines.take():
                if line.isspace():
                    continue
                if '"' not in line:
                    yield line.rstrip("\n").split("\t"), None
                else:
                    yield self._quoted_record(line, lines)

    def _quoted_record(self, line: str, lines: "_Lines") -> tuple[list[str], str | None]:
        plain = _fields_of_line(line)
        try:
            fields = _quoted_fields([line])
        except csv.Error as error:
            return self._record_over_lines(line, lines) if _is_open(error) else (plain, None)
        return fields if len(fields) == len(self.columns) else plain, None

    def _record_over_lines(self, first: str, lines: "_Lines") -> tuple[list[str], str | None]:
        """Find where the quotation mark is closed that a line opens; it is text if rows come first."""
        plain = _fields_of_line(first)
        known = plain[: len(self.columns)]
        keys = [place for place, field in enumerate(known) if KEY.fullmatch(field) and not field.startswith('"')]
        record, num_others = [first], 0
        for line in itertools.islice(lines.ahead(), MAX_LINES_OF_FIELD):
            record.append(line)
            if self._is_row(line, keys) and self._is_row(first, keys):
                break
            num_others += not line.isspace()
            if '"' in line:
                try:
                    fields = _quoted_fields(record)
                except csv.Error as error:
                    if _is_open(error):
                        continue
                    break
                if len(fields) == len(self.columns):
                    lines.drop(len(record) - 1)
                    return fields, None
                break
        is_cut = num_others > 0 and len(self.columns) > 1
        return plain, UNCLOSED_QUOTE if is_cut else None

    def _is_row(self, line: str, keys: Sequence[int]) -> bool:
        """Whether a line has the fields of a row, and keys or paths where another has them."""
        fields = _fields_of_line(line)
        is_wide = 1 < len(self.columns) == len(fields)
        return is_wide and all(KEY.fullmatch(fields[place]) for place in keys)


class _Lines:
    """The lines of a text, with a look ahead."""

    def __init__(self, text: TextIO) -> None:
        self._rest = iter(text)
        self._seen: list[str] = []

    def take(self) -> str:
        """The next line; "" at the end."""
        return self._seen.pop(0) if self._seen else next(self._rest, "")

    def ahead(self) -> Iterator[str]:
        """The next lines, which stay."""
        for place in itertools.count():
            if place == len(self._seen):
                if not (line := next(self._rest, "")):
                    return
                self._seen.append(line)
            yield self._seen[place]

    def drop(self, number: int) -> None:
        """Forget so many of the next lines."""
        del self._seen[:number]


def _quoted_fields(lines: Sequence[str]) -> list[str]:
    """The fields of one record, with marks around a field as CSV has them; raises `csv.Error` if they are not so."""
    records = list(csv.reader(lines, delimiter="\t", strict=True))
    if len(records) != 1:
        raise csv.Error("it is several records")
    records[0][-1] = records[0][-1].removesuffix("\n")
    return records[0]


def _is_open(error: csv.Error) -> bool:
    return "unexpected end" in str(error)


def _fields_of_line(line: str) -> list[str]:
    fields = line.rstrip("\n").split("\t")
    return [_unquoted(field) for field in fields] if '"' in line else fields


def _unquoted(field: str) -> str:
    if len(field) < 2 or not field.startswith('"') or not field.endswith('"'):
        return field
    inner = field[1:-1]
    return field if '"' in inner.replace('""', "") else inner.replace('""', '"')
