"""The cells of a user's table as values of one type a column, whatever its format says of types."""

import datetime
import decimal
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from errors import UserError
from pipelines.columns.grammar import is_word
from pipelines.engine.progress import get_logger
from pipelines.raw.tables.open_table import Table
from pipelines.raw.tables.tab_tables import TabTable
from pipelines.raw.tables.text_tables import CsvTable

BOOL, INTEGER, FLOAT, STRING, OTHER = "bool", "integer", "float", "string", "other"
# Of numbers that float32 holds as they are, as tables of scores do: 0.7 in a recipe is rounded as theirs was.
SHORT_FLOAT = "float32"
ARROW_TYPES = {
    BOOL: pa.bool_(),
    INTEGER: pa.int64(),
    FLOAT: pa.float64(),
    SHORT_FLOAT: pa.float32(),
    STRING: pa.string(),
}
FLOATS = (FLOAT, SHORT_FLOAT)
MAX_FLOAT32 = float(np.finfo(np.float32).max)
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,18})")
TRUTHS = {"true": True, "false": False}
MISSING = ("", "null", "none", "na", "n/a")
MAX_INTEGER = 2**63 - 1
# In every file of columns, and so of no table.
TAKEN = ("key", "shard", "reject")
# What a database keeps of NaN, which would be null there.
NAN = "nan"

log = get_logger("columns")


@dataclass(frozen=True, kw_only=True)
class JoinedColumn:
    """A column to join: its name in the table, what it is called here, and the kind of its cells."""

    source: str
    name: str
    kind: str


@dataclass
class KindsSeen:
    """Which kinds the cells of a column have, and whether float32 holds all of its numbers as they are."""

    kinds: set[str] = field(default_factory=set)
    are_short: bool = True

    def add(self, cell: Any, table: Table) -> None:
        """Look at a cell."""
        value = _value(cell, table)
        if value is not None:
            self.kinds.add(_kind(value))
            self.are_short = self.are_short and _is_short(value)

    @property
    def kind(self) -> str:
        """The one kind that holds all of them."""
        if not self.kinds:
            return FLOAT
        if FLOAT in self.kinds and self.kinds <= {INTEGER, FLOAT}:
            return SHORT_FLOAT if self.are_short else FLOAT
        if len(self.kinds) == 1:
            return next(iter(self.kinds))
        return OTHER if OTHER in self.kinds else STRING


def row_columns(key: str, kinds: Mapping[str, KindsSeen], *, are_named: bool) -> list[JoinedColumn]:
    """Return the columns to join; of those that nobody has named, what is no number, text or truth, or has a name that
    no expression could write, is left out.

    Raises:
        UserError: one that is named is such a one, two have one name, or there is none; names `key`.
    """
    columns, left_out = [], []
    for source, seen in kinds.items():
        name = re.sub(r"[^a-z0-9]+", "_", source.lower()).strip("_")
        can_be_named = re.fullmatch(r"[a-z][a-z0-9_]*", name) and name not in TAKEN and not is_word(name)
        if seen.kind != OTHER and can_be_named:
            columns.append(JoinedColumn(source=source, name=name, kind=seen.kind))
        elif are_named:
            what = (
                "has lists or objects, and a column holds numbers, texts or truths"
                if seen.kind == OTHER
                else f"cannot be called {name!r} in expressions: give it another name in the table"
            )
            raise UserError(f"{key}: the column {source!r} {what}")
        else:
            left_out.append(source)
    names = [column.name for column in columns]
    if double := next((name for name in names if names.count(name) > 1), None):
        sources = " and ".join(repr(column.source) for column in columns if column.name == double)
        raise UserError(f"{key}: {sources} would both be called {double}: name the columns to join, behind #key,")
    if not columns:
        raise UserError(f"{key}: it has no column of numbers, texts or truths beside its keys")
    if left_out:
        log.info(f"{key}: left out are {', '.join(left_out)}: no numbers, texts or truths, or no names of columns")
    return columns


def _value(cell: Any, table: Table) -> Any:
    """Return a cell as a value; texts of formats that know nothing else are read as what they look like."""
    if isinstance(cell, bytes):
        cell = cell.decode(errors="backslashreplace")
    if isinstance(cell, decimal.Decimal):
        return float(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    if not isinstance(cell, str) or not isinstance(table, CsvTable | TabTable):
        return cell
    text = cell.strip()
    if text.lower() in MISSING:
        return None
    if text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    try:
        return int(text) if WHOLE.fullmatch(text) else float(text) if "_" not in text else cell
    except ValueError:
        return cell


def _kind(value: Any) -> str:
    match value:
        case bool():
            return BOOL
        case int():
            return INTEGER if abs(value) <= MAX_INTEGER else STRING
        case float():
            return FLOAT
        case str():
            return STRING
        case _:
            return OTHER


def _is_short(value: Any) -> bool:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return True
    return abs(value) <= MAX_FLOAT32 and float(np.float32(value)) == value


def of_cell(cell: Any, column: JoinedColumn, table: Table) -> Any:
    """Return a cell as the database keeps it."""
    value = _value(cell, table)
    if value is None:
        return None
    if column.kind == STRING:
        text = cell if isinstance(cell, str) else value if isinstance(value, str) else str(value)
        return text.encode("utf-8", errors="backslashreplace").decode()
    if column.kind in FLOATS:
        return NAN if math.isnan(value) else float(value)
    return int(value)


def read_back(cell: Any, column: JoinedColumn) -> Any:
    """Return what `of_cell` was given."""
    if cell is None:
        return None
    return bool(cell) if column.kind == BOOL else math.nan if column.kind in FLOATS and cell == NAN else cell
