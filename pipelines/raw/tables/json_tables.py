"""Tables of JSON: lines of objects, and documents with a list of them, read through a window."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from errors import UserError
from pipelines.raw.tables.rows import ROWS_LOOKED_AT, Rows, TableRow, field_names, pick, require_columns
from pipelines.raw.tables.text_tables import LINE_COLUMN, open_text
from pipelines.raw.texts import TEXT_FIELDS, field_of

NOT_JSON = "not_json"
KEY_COLUMN = "key"  # of an object of texts or objects by key
COCO_LIST = "annotations"
WINDOW_CHARACTERS = 1 << 20
FIRST_LINE_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 1 << 26
CHARACTERS_SHOWN = 60
SPACE = " \t\r\n"


class JsonLinesTable:
    """A table of one JSON object a line; blank lines are no rows, and a line that is no object is a reject."""

    fault: str | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        records = [_record_of_line(line) for line in itertools.islice(self._lines(), ROWS_LOOKED_AT)]
        if records and not any(record is not None for record in records):
            raise UserError(
                f"{path}: none of its first {len(records):,} lines is an object of JSON, as JSON lines are; the first "
                f"is {next(self._lines()).strip()[:CHARACTERS_SHOWN]!r}"
            )
        self.columns = field_names(record for record in records if record is not None)

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows; reads the file once."""
        return sum(1 for _ in self._lines())

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        require_columns(self.path, columns, self.columns)
        for number, line in pick(self._lines(), rows):
            yield _row(number, _record_of_line(line), columns)

    def _lines(self) -> Iterator[str]:
        with open_text(self.path) as text:
            yield from (line for line in text if not line.isspace())


class JsonTable:
    """A table of one JSON document.

    It is a list of objects or texts; or an object with one such list (of several, COCO's `annotations`); or an object
    of texts or objects by key, as `{"a.jpg": "a dog"}`, with the columns `key` and `text`, or `key` and theirs.
    """

    fault: str | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        with open_text(path) as text:
            self._is_list = _Window(text, path).next_character() == "["
        self._list = "" if self._is_list else self._choose_list()
        records = (_record_of(value) for value in itertools.islice(self._values(), ROWS_LOOKED_AT))
        self.columns = field_names(record for record in records if record is not None)

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows; reads the file once."""
        return sum(1 for _ in self._values())

    def rows(self, rows: Rows, columns: Sequence[str]) -> Iterator[TableRow]:
        """See `Table`."""
        if self.columns:
            require_columns(self.path, columns, self.columns)
        for number, value in pick(self._values(), rows):
            yield _row(number, _record_of(value), columns)

    def _choose_list(self) -> str | None:
        """The name of the list that holds the rows; None if the document's own fields are rows."""
        sizes: Counter[str] = Counter()
        for name, _, value in self._walk():
            if name is not None and isinstance(value, dict | str):
                sizes[name] += 1
        if len(sizes) <= 1 or COCO_LIST in sizes:
            return COCO_LIST if COCO_LIST in sizes else next(iter(sizes), None)
        raise UserError(
            f"{self.path} holds several lists ({', '.join(sizes)}), and which one has the rows is not for us to say; "
            f"write it into a file of its own, or call it {COCO_LIST!r} as COCO does"
        )

    def _values(self) -> Iterator[Any]:
        """What the rows are made of."""
        if self._list is not None:
            yield from (value for name, _, value in self._walk() if name == self._list)
            return
        fields = ((key, value) for _, key, value in self._walk())
        start = dict(itertools.islice(fields, ROWS_LOOKED_AT))
        if set(start) & set(TEXT_FIELDS) or not all(isinstance(value, str | dict) for value in start.values()):
            yield start | dict(fields)
            return
        for key, value in itertools.chain(start.items(), fields):
            record = _record_of(value)
            yield value if record is None else {KEY_COLUMN: key, **record}

    def _walk(self) -> Iterator[tuple[str | None, str, Any]]:
        """Elements of the document's lists as (name of the list, "", element), other fields as (None, name, value)."""
        with open_text(self.path) as text:
            window = _Window(text, self.path)
            if self._is_list:
                yield from (("", "", value) for value in window.elements())
            else:
                for key in window.field_names():
                    if window.next_character() == "[":
                        yield from ((key, "", value) for value in window.elements())
                    else:
                        yield None, key, window.value()
            if window.next_character():
                raise window.fault("something follows the end of the document")


class _Window:
    """A part of a JSON text that moves on, so that a list of any length takes the memory of one element."""

    def __init__(self, text: TextIO, path: str) -> None:
        self._text, self._path = text, path
        self._data, self._at, self._lines_before = "", 0, 0
        self._has_ended = False
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            while self._at < len(self._data):
                if self._data[self._at] not in SPACE:
                    return self._data[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, allowed: str) -> str:
        """The next character, which has to be one of `allowed`."""
        found = self.next_character()
        if not found:
            raise self.fault("it ends too early: it was not written or fetched to its end")
        if found not in allowed:
            raise self.fault(f"{' or '.join(allowed)} was expected, and {found!r} is there")
        self._at += 1
        return found

    def elements(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.take("[")
        if self.next_character() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def field_names(self) -> Iterator[str]:
        """The names of the fields of the object that begins here; after each its value has to be read."""
        self.take("{")
        if self.next_character() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self.fault("the name of a field is no text")
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def value(self) -> Any:
        """The value that begins here."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._data, self._at)
            except json.JSONDecodeError as error:
                reason = error.msg
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
                raise self.fault(str(error)) from None
            else:
                # A number may go on where the window ends.
                if end < len(self._data) or not self._fill():
                    self._at = end
                    return value
                continue
            if len(self._data) - self._at > MAX_VALUE_CHARACTERS or not self._fill():
                at_end = self._has_ended and len(self._data) - self._at <= MAX_VALUE_CHARACTERS
                raise self.fault(f"{reason}{', or it was not written or fetched to its end' if at_end else ''}")

    def fault(self, reason: str) -> UserError:
        """What to say of damage here."""
        line = self._lines_before + self._data.count("\n", 0, self._at) + 1
        return UserError(f"{self._path} is no JSON: line {line}: {reason}")

    def _fill(self) -> bool:
        """Forget what has been read, and read at least as much as is left; False at the end of the text."""
        more = self._text.read(max(WINDOW_CHARACTERS, len(self._data) - self._at))
        if not more:
            self._has_ended = True
            return False
        self._lines_before += self._data.count("\n", 0, self._at)
        self._data, self._at = self._data[self._at :] + more, 0
        return True


def begins_as_lines(text: TextIO) -> bool:
    """Whether a text is lines of JSON objects rather than one document, told by its beginning."""
    start = text.read(FIRST_LINE_CHARACTERS).lstrip()
    first, newline, rest = start.partition("\n")
    if not start.startswith("{") or not newline:
        return False
    return _record_of_line(first) is not None and rest.lstrip().startswith("{")


def _record_of_line(line: str) -> dict[str, Any] | None:
    try:
        return _record_of(json.loads(line))
    except (ValueError, RecursionError):  # RecursionError: nested too deeply; ValueError: also a number too long
        return None


def _record_of(value: Any) -> dict[str, Any] | None:
    return {LINE_COLUMN: value} if isinstance(value, str) else value if isinstance(value, dict) else None


def _row(number: int, record: dict[str, Any] | None, columns: Sequence[str]) -> TableRow:
    if record is None:
        return TableRow(number, dict.fromkeys(columns), NOT_JSON)
    return TableRow(number, {name: field_of(record, name) for name in columns})
