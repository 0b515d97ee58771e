"""What every reader of tables gives: numbered rows of named cells, and what the cell of a text or a key means."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np

from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.raw.texts import split_place

COLUMNS_NAMED = 30
# Rows of JSON need not have the same fields: the columns are those of so many rows at the beginning.
ROWS_LOOKED_AT = 1000

Rows = range | np.ndarray  # ascending row numbers
Item = TypeVar("Item")


class TableRow(NamedTuple):
    """A row by its number, counted from 0 without blank lines; `reject` says why it cannot be used.

    `values` has the columns asked for. Text is `str`, and where it is not UTF-8 it has lone surrogates, as of
    `errors="surrogateescape"`, which `text_of_value` and `key_of_cell` know; binary columns are `bytes`.
    """

    number: int
    values: dict[str, Any]
    reject: str | None = None


def local_name(cell: str) -> str:
    """Return the path that the cell of a table means: one after `file://` is percent-encoded, `~` is the home."""
    if cell.startswith("file://"):
        return unquote(cell.removeprefix("file://").removeprefix("localhost"))
    if cell.startswith("~/"):
        return f"{Path.home()}/{cell[2:]}"
    return cell


def key_of_cell(value: Any) -> str:
    """Return a cell as a key that any file can hold: what is not UTF-8 is spelled out, so that keys stay apart."""
    if isinstance(value, str) and value.isascii():
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of whole numbers where one is missing
    try:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", errors="surrogateescape")
    except UnicodeError:  # half of a surrogate pair, of JSON
        data = str(value).encode("utf-8", errors="backslashreplace")
    return data.decode("utf-8", errors="backslashreplace")


def require_columns(path: str, wanted: Sequence[str], columns: Sequence[str]) -> None:
    """Make sure that a table has the columns that are asked for, each once.

    Raises:
        UserError: one is missing or there twice; names the columns there are, and those of nearly that name.
    """
    for name in wanted:
        if name not in columns:
            more = f", … ({len(columns)} in all)" if len(columns) > COLUMNS_NAMED else ""
            listed = ", ".join(columns[:COLUMNS_NAMED]) or "none"
            raise UserError(
                f"{path}: no column {name!r}; columns are {listed}{more}{did_you_mean(name, columns, most=3)}"
            )
        if columns.count(name) > 1:
            raise UserError(f"{path}: the column {name!r} is there {columns.count(name)} times; rename all but one")


def column_and_place(path: str, name: str, columns: Sequence[str]) -> tuple[str, int | None]:
    """Return which column of a table, and which text of its lists, a name means: `captions[1]`, see `split_place`.

    Raises:
        UserError: there is no such column.
    """
    column, place = (name, None) if name in columns else split_place(name)
    require_columns(path, [column], columns)
    return column, place


def pick(items: Iterable[Item], rows: Rows) -> Iterator[tuple[int, Item]]:
    """The items at the given places, with their places; reads no further than the last one."""
    if isinstance(rows, range):
        yield from itertools.islice(enumerate(items), rows.start, rows.stop)
        return
    position, rest = 0, iter(items)
    for row in rows.tolist():
        for item in itertools.islice(rest, row - position, row - position + 1):
            yield row, item
        position = row + 1


def field_names(records: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the fields of some objects, in order; those of objects within them as `a.b`."""
    names: dict[str, None] = {}
    for record in records:
        for name, value in record.items():
            names[name] = None
            if isinstance(value, dict):
                names.update(dict.fromkeys(f"{name}.{inner}" for inner in value))
    return list(names)
