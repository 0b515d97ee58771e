"""The rows of a user's table by the place of their image, in a database on disk: built once, of bounded memory.

`RUN/.tables/<name>.sqlite` is a copy of what the table says and can be deleted at any time. It counts only while the
files of the table are the same.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from curation.joined_cells import JoinedColumn, KindsSeen, of_cell, read_back, row_columns
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.engine.progress import get_logger, progress_bar
from pipelines.raw.caption_files import choose_key_column, find_files
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.places import beginnings, choose_rows, place_of
from pipelines.raw.tables.rows import key_of_cell, require_columns
from pipelines.store.files import atomic_file, is_remote, open_ranges, sha256_text

FOLDER = ".tables"
FORMAT_VERSION = 1  # raised when rows are read or placed in another way
ROWS_AT_ONCE = 10_000
EVERY_ROW = range(2**62)
# Of rows below a sample's place: more are of as many images in other folders.
MAX_CANDIDATES = 100

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


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What is known of an index without a look at its rows: a hash over all of them, and the columns that it has."""

    identity: str
    num_rows: int
    num_without_key: int
    columns: list[JoinedColumn]
    files: list[tuple[str, str | None, int]]


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    place: str


class TableIndex:
    """An open index."""

    def __init__(self, path: Path) -> None:
        # Nobody writes it: without locks, which shared storage may not have.
        self._database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def facts(self) -> TableFacts:
        """Return what was found when it was built; raises `sqlite3.Error`, `ValueError` or `TypeError` if damaged."""
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version}")
        (content,) = self._database.execute("SELECT content FROM facts").fetchone()
        facts = json.loads(content)
        columns = [JoinedColumn(**each) for each in facts["columns"]]
        return TableFacts(**{**facts, "columns": columns, "files": [tuple(file) for file in facts["files"]]})

    def find(self, places: Sequence[str]) -> list[int]:
        """Return the numbers of the rows that may be of a sample, at the first of its places that has rows.

        Of several that agree with the place equally well all are given.
        """
        for place in places:
            if rows := self._candidates(place):
                return [row.number for row in choose_rows(rows, place)]
        return []

    def values(self, number: int, columns: Sequence[JoinedColumn]) -> list[Any]:
        """Return the values of a row."""
        row = self._database.execute("SELECT * FROM rows WHERE number = ?", (number,)).fetchone()
        return [read_back(cell, column) for cell, column in zip(row[2:], columns, strict=True)]

    def where(self, number: int, files: Sequence[tuple[str, str | None, int]]) -> str:
        """Return which row of which file a number is."""
        return _where(number, files)

    def _candidates(self, place: str) -> list[_Row]:
        key, shorter = place.rpartition("/")[0], beginnings(place)
        marks = ",".join("?" * len(shorter))
        # "0" comes after "/".
        query = (
            f"SELECT number, place FROM rows WHERE place IN ({marks}) UNION "
            "SELECT * FROM (SELECT number, place FROM rows WHERE place > ? AND place < ? LIMIT ?) ORDER BY number"
        )
        values = (*shorter, f"{key}/", f"{key}0", MAX_CANDIDATES)
        return [_Row(*row) for row in self._database.execute(query, values)]


def open_index(address: TableAddress, run: Path) -> tuple[Path, TableFacts]:
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
    facts = _recall(path)
    if facts is None or None in stamps or [stamp for _, stamp, _ in facts.files] != stamps:
        with atomic_file(path) as temporary:
            facts = _build(address, files, stamps, temporary)
    if facts.num_without_key:
        log.warning(
            f"{address.key}: {facts.num_without_key:,} of {facts.num_rows:,} rows have no key, and are left out"
        )
    return path, facts


def _recall(path: Path) -> TableFacts | None:
    if not path.is_file():
        return None
    try:
        index = TableIndex(path)
        try:
            return index.facts()
        finally:
            index.close()
    except (sqlite3.Error, ValueError, TypeError) as error:
        log.warning(f"{path} is damaged or of another version ({error}): the table is read again")
        return None


def _build(address: TableAddress, files: Sequence[str], stamps: Sequence[str | None], path: Path) -> TableFacts:
    columns = _choose_columns(address, files)
    database = sqlite3.connect(path, isolation_level=None)
    try:
        for setting in ("journal_mode=OFF", "synchronous=OFF"):
            database.execute(f"PRAGMA {setting}")
        cells = ", ".join(f"c{index}" for index in range(len(columns)))
        database.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, place TEXT, {cells})")
        database.execute("BEGIN")
        digest, starts, num_rows, num_without_key = hashlib.sha256(), list[int](), 0, 0
        insert = f"INSERT INTO rows VALUES ({', '.join('?' * (2 + len(columns)))})"
        with progress_bar("columns table", len(files), unit="files") as progress:
            for file in files:
                starts.append(num_rows)
                for block in _blocks(address, file, columns, first=num_rows):
                    database.executemany(insert, block)
                    num_rows += len(block)
                    num_without_key += sum(row[1] is None for row in block)
                    digest.update(repr([row[1:] for row in block]).encode(errors="surrogatepass"))
                    progress.advance(0, note=f"{num_rows:,} rows")
                progress.advance(1)
        database.execute("CREATE INDEX places ON rows (place)")
        placed = list(zip(files, stamps, starts, strict=True))
        _refuse_double_keys(database, address, placed)
        digest.update(json.dumps([asdict(column) for column in columns]).encode())
        facts = TableFacts(
            identity=digest.hexdigest(),
            num_rows=num_rows,
            num_without_key=num_without_key,
            columns=columns,
            files=placed,
        )
        database.execute("CREATE TABLE facts (content TEXT)")
        database.execute("INSERT INTO facts VALUES (?)", (json.dumps(asdict(facts)),))
        database.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        database.execute("COMMIT")
    finally:
        database.close()
    return facts


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


def _blocks(
    address: TableAddress, file: str, columns: Sequence[JoinedColumn], *, first: int
) -> Iterator[list[tuple[Any, ...]]]:
    block: list[tuple[Any, ...]] = []
    with open_table(file) as table:
        key = _key_column(address, file, table.columns)
        names = [column.source for column in columns]
        there = [name for name in names if name in table.columns]
        for number, row in enumerate(table.rows(EVERY_ROW, list(dict.fromkeys([key, *there]))), start=first):
            cell = row.values.get(key)
            is_key = row.reject is None and cell is not None and not isinstance(cell, dict | list)
            place = (place_of(key_of_cell(cell)) or None) if is_key else None
            cells = [of_cell(row.values.get(column.source), column, table) for column in columns]
            block.append((number, place, *cells))
            if len(block) == ROWS_AT_ONCE:
                yield block
                block = []
    if block:
        yield block


def _refuse_double_keys(
    database: sqlite3.Connection, address: TableAddress, files: Sequence[tuple[str, str | None, int]]
) -> None:
    """Raise `UserError` where two rows have one key: nobody knows which of them is meant."""
    query = "SELECT place FROM rows WHERE place NOT NULL GROUP BY place HAVING count(*) > 1 ORDER BY min(number)"
    doubles = [place for (place,) in database.execute(query)]
    if not doubles:
        return
    rows = database.execute("SELECT number FROM rows WHERE place = ? ORDER BY number", (doubles[0],)).fetchmany(2)
    first, second = (_where(number, files) for (number,) in rows)
    name = "/".join(reversed(doubles[0].split("/")))
    raise UserError(
        f"{address.key}: {len(doubles):,} keys have several rows, such as {name!r}: {first} and {second}; "
        "keep one of each"
    )


def _where(number: int, files: Sequence[tuple[str, str | None, int]]) -> str:
    file, _, start = [each for each in files if each[2] <= number][-1]
    return f"row {number - start + 1:,} of {file}"
