"""The rows of a user's table by the place of their image: `RUN/.tables/<name>.sqlite`, see `row_index` of tables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curation.joined_cells import JoinedColumn, KindsSeen, of_cell, read_back, row_columns
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.engine.progress import get_logger
from pipelines.raw.caption_files import choose_key_column, find_files
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.places import choose_rows, place_of
from pipelines.raw.tables.row_index import IndexFacts, NewRow, RowIndex, SharedPlaces, TableToIndex, Where, open_facts
from pipelines.raw.tables.rows import key_of_cell, require_columns
from pipelines.store.files import is_remote, open_ranges, sha256_text

FOLDER = ".tables"
FORMAT_VERSION = 3
EVERY_ROW = range(2**62)

log = get_logger("columns")


@dataclass(frozen=True, kw_only=True)
class TableAddress:
    """Where a table is: `files` as a path, a glob, a folder or a URL; `key_column` None is the first of a known name.

    `columns` are those to join; none means all that hold numbers, texts or truth.
    """

    key: str
    files: str
    key_column: str | None
    columns: tuple[str, ...]


def parse_address(key: str, text: str) -> TableAddress:
    """Return an address: `files`, `files#key` or `files#key,column,…`; `key` is the recipe's, for errors.

    Raises:
        UserError: what follows `#` is no list of names.
    """
    files, names = text, ""
    if "#" in text and not typed_path(text).exists():
        files, _, names = text.rpartition("#")
    parts = [name.strip() for name in names.split(",")] if names else []
    if not files or not all(parts):
        raise UserError(f"{key} = {text!r}: write files#key,column,… with the names of columns, or no #")
    return TableAddress(key=key, files=files, key_column=parts[0] if parts else None, columns=tuple(parts[1:]))


class JoinedRows:
    """An open index of a table, with the columns that it gives."""

    def __init__(self, path: Path) -> None:
        """Open a file; raises as `RowIndex`."""
        self._index = RowIndex(path, version=FORMAT_VERSION)
        self._columns = columns_of(self._index.facts)

    def close(self) -> None:
        """Close the file."""
        self._index.close()

    def find(self, places: Sequence[str]) -> list[int]:
        """Return the numbers of the rows that may be of a sample, at the first of its places that has rows.

        Of several that agree with the place equally well all are given.
        """
        for place in places:
            if rows := self._index.candidates(place):
                return [row.number for row in choose_rows(rows, place)]
        return []

    def values(self, number: int) -> list[Any]:
        """Return the values of a row, one for each column."""
        cells = self._index.cells(number)
        return [read_back(cell, column) for cell, column in zip(cells, self._columns, strict=True)]


def columns_of(facts: IndexFacts) -> list[JoinedColumn]:
    """Return the columns that a table gives."""
    return [JoinedColumn(**each) for each in facts.own["columns"]]


def open_index(address: TableAddress, run: Path) -> tuple[Path, IndexFacts]:
    """Return the index of a table, built if it is not there or a file of the table has changed.

    Raises:
        MissingFileError, UserError, StorageError: a file is missing, cannot be read or lacks a column, or two rows
            have one key; names the recipe's key, the file and the rows.
    """
    files = sorted(find_files(address.key, address.files))
    places = [file if is_remote(file) else str(Path(file).absolute()) for file in files]
    name = sha256_text(json.dumps([places, address.key_column, address.columns]))[:24]
    path = run.absolute() / FOLDER / f"{name}.sqlite"
    stamps = []
    for file in files:
        with open_ranges(file) as opened:
            stamps.append(opened.stamp)
    facts = open_facts(path, files, stamps, version=FORMAT_VERSION, table=lambda: _table(address, files))
    if num_without_key := facts.own["num_without_key"]:
        log.warning(f"{address.key}: {num_without_key:,} of {facts.num_rows:,} rows have no key, and are left out")
    return path, facts


def _table(address: TableAddress, files: Sequence[str]) -> TableToIndex:
    columns, num_without_key = _choose_columns(address, files), 0

    def rows(file: str) -> Iterator[NewRow]:
        nonlocal num_without_key
        for row in _rows(address, file, columns):
            num_without_key += row[0] is None
            yield row

    def own(shared: SharedPlaces, where: Where) -> Mapping[str, Any]:
        _refuse_double_keys(address, shared, where)
        return {"columns": [asdict(column) for column in columns], "num_without_key": num_without_key}

    return TableToIndex(columns=[column.name for column in columns], rows=rows, digest=_digest, own=own)


def _digest(row: NewRow) -> bytes:
    return repr(row).encode(errors="surrogatepass")


def _key_column(address: TableAddress, file: str, columns: Sequence[str]) -> str:
    found = address.key_column or choose_key_column(columns)
    if found is None:
        raise UserError(
            f"{address.key}: {file}: none of its columns is known as that of the keys, such as key, path, image or id; "
            f"columns are {', '.join(columns)}; write {address.files}#key,column"
        )
    try:
        require_columns(file, [found, *address.columns], columns)
    except UserError as error:
        raise UserError(f"{address.key}: {error}") from None
    return found


def _choose_columns(address: TableAddress, files: Sequence[str]) -> list[JoinedColumn]:
    """Return the columns to join with the type that all of their cells have, after a first look at every row."""
    kinds: dict[str, KindsSeen] = {}
    for file in files:
        with open_table(file) as table:
            require_sound(table)
            key = _key_column(address, file, table.columns)
            names = list(address.columns) or [name for name in table.columns if name != key and "." not in name]
            for row in table.rows(EVERY_ROW, names):
                for name in names:
                    kinds.setdefault(name, KindsSeen()).add(row.values.get(name), table)
    return row_columns(address.key, kinds, are_named=bool(address.columns))


def _rows(address: TableAddress, file: str, columns: Sequence[JoinedColumn]) -> Iterator[NewRow]:
    with open_table(file) as table:
        key = _key_column(address, file, table.columns)
        there = [column.source for column in columns if column.source in table.columns]
        for row in table.rows(EVERY_ROW, list(dict.fromkeys([key, *there]))):
            cell = row.values.get(key)
            is_key = row.reject is None and cell is not None and not isinstance(cell, dict | list)
            place = (place_of(key_of_cell(cell)) or None) if is_key else None
            yield place, tuple(of_cell(row.values.get(column.source), column, table) for column in columns)


def _refuse_double_keys(address: TableAddress, shared: SharedPlaces, where: Where) -> None:
    """Raise `UserError` where two rows have one key: nobody knows which of them is meant."""
    doubles = next(shared, None)
    if doubles is None:
        return
    num_more = sum(1 for _ in shared)
    name = "/".join(reversed(doubles[0].place.split("/")))
    first, second = (where(row.number) for row in doubles[:2])
    raise UserError(
        f"{address.key}: {1 + num_more:,} keys have several rows, such as {name!r}: {first} and {second}; "
        "keep one of each"
    )
