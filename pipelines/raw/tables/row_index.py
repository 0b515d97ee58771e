"""Rows of a user's table by the place of their image, in a database on disk: built once, read by every worker.

The file is a copy of what the table says and can be deleted at any time. It counts only while the files of the table
are the same; memory is bounded, however many rows there are.
"""

import hashlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.engine.progress import get_logger, progress_bar
from pipelines.raw.tables.places import beginnings
from pipelines.store.files import atomic_file

ROWS_AT_ONCE = 10_000
CACHE_KIBIBYTES, MAPPED_BYTES = 200_000, 1 << 40
# Of rows below a sample's place: more are of as many images in other folders.
MAX_CANDIDATES = 100

log = get_logger("tables")

# The place that a row names, or None, and its cells.
NewRow = tuple[str | None, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class IndexedRow:
    """A row: its number over all files, the place it names, its cells."""

    number: int
    place: str
    cells: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """A file of a table: its stamp, None where storage cannot tell, and how many rows came before it."""

    path: str
    stamp: str | None
    start: int


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What is known of an index without a look at its rows.

    Attributes:
        identity: hash over all rows, in order.
        own: what `TableToIndex.own` has said.
    """

    identity: str
    num_rows: int
    files: list[IndexedFile]
    own: Mapping[str, Any]

    def where(self, number: int) -> str:
        """Return which row of which file a number is."""
        file = [each for each in self.files if each.start <= number][-1]
        return f"row {number - file.start + 1:,} of {file.path}"


# Rows that name one place, with a way to say where a row is.
SharedPlaces = Iterator[list[IndexedRow]]
Where = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class TableToIndex:
    """How the rows of a table are read.

    Attributes:
        columns: names for the cells of a row.
        rows: gives the rows of a file.
        digest: gives what the identity knows of a row.
        own: gives, as JSON values, what else is to be known; it sees the rows of each place that several rows name, and
            may raise.
    """

    columns: Sequence[str]
    rows: Callable[[str], Iterable[NewRow]]
    digest: Callable[[NewRow], bytes]
    own: Callable[[SharedPlaces, Where], Mapping[str, Any]]


class RowIndex:
    """An open index, for any thread."""

    def __init__(self, path: Path, *, version: int) -> None:
        """Open a file; raises `sqlite3.Error`, `ValueError` or `TypeError` if it is damaged or of another version."""
        # Nobody writes it: without locks, which shared storage may not have.
        address = f"file:{quote(str(path))}?mode=ro&immutable=1"
        self._database = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._one_at_a_time = threading.Lock()
        try:
            self._database.execute(f"PRAGMA mmap_size={MAPPED_BYTES}")
            self.facts = _read_facts(self._database, version)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def cells(self, number: int) -> tuple[Any, ...]:
        """Return the cells of a row."""
        return self._query("SELECT * FROM rows WHERE number = ?", (number,))[0][2:]

    def first_place(self) -> str | None:
        """Return the first place that a row names."""
        found = self._query("SELECT place FROM rows WHERE place NOT NULL LIMIT 1", ())
        return found[0][0] if found else None

    def candidates(self, place: str) -> list[IndexedRow]:
        """Return the rows that may be of a sample at this place, see `places`, in the order of the table."""
        # The shard alone is no place of a sample.
        key, shorter = place.rpartition("/")[0], beginnings(place)
        marks = ",".join("?" * len(shorter))
        query = (
            f"SELECT * FROM rows WHERE place IN ({marks}) UNION ALL "
            "SELECT * FROM (SELECT * FROM rows WHERE place > ? AND place < ? LIMIT ?)"
        )
        # "0" comes after "/".
        rows = {row[0]: row for row in self._query(query, (*shorter, f"{key}/", f"{key}0", MAX_CANDIDATES))}
        return [_indexed(row) for _, row in sorted(rows.items())]

    def _query(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._one_at_a_time:
            return self._database.execute(query, values).fetchall()


def open_facts(
    path: Path,
    files: Sequence[str],
    stamps: Sequence[str | None],
    *,
    version: int,
    table: Callable[[], TableToIndex],
) -> IndexFacts:
    """Return the facts of an index, which is built if it is not there or a file of the table has changed.

    Args:
        path: of the index.
        files: of the table, in order.
        stamps: of the files, what changes when they do; None where storage cannot tell.
        version: raised when rows are read or placed in another way.
        table: called when it is built.
    """
    facts = _recall(path, version)
    if facts is None or None in stamps or [file.stamp for file in facts.files] != list(stamps):
        with atomic_file(path) as temporary:
            facts = _build(temporary, files, stamps, version=version, table=table())
    return facts


def _recall(path: Path, version: int) -> IndexFacts | None:
    if not path.is_file():
        return None
    try:
        with closing(RowIndex(path, version=version)) as index:
            return index.facts
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        log.warning(f"{path} is damaged or of another version ({error}): its table is read again")
        return None


def _build(
    path: Path, files: Sequence[str], stamps: Sequence[str | None], *, version: int, table: TableToIndex
) -> IndexFacts:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIBIBYTES}"):
            database.execute(f"PRAGMA {setting}")
        names = "".join(f", c{place}" for place in range(len(table.columns)))
        database.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, place TEXT{names})")
        database.execute("BEGIN")
        identity, num_rows, starts = _insert(database, files, table)
        database.execute("CREATE INDEX places ON rows (place)")
        placed = [
            IndexedFile(path=file, stamp=stamp, start=start)
            for file, stamp, start in zip(files, stamps, starts, strict=True)
        ]
        facts = IndexFacts(identity=identity, num_rows=num_rows, files=placed, own={})
        facts = replace(facts, own=table.own(_shared_places(database), facts.where))
        database.execute("CREATE TABLE facts (content TEXT)")
        database.execute("INSERT INTO facts VALUES (?)", (json.dumps(asdict(facts)),))
        database.execute(f"PRAGMA user_version={version}")
        database.execute("COMMIT")
    return facts


def _insert(database: sqlite3.Connection, files: Sequence[str], table: TableToIndex) -> tuple[str, int, list[int]]:
    """Write all rows; return the hash over them, their number, and how many come before each file."""
    digest, starts, num_rows = hashlib.sha256(), list[int](), 0
    insert = f"INSERT INTO rows VALUES ({', '.join('?' * (2 + len(table.columns)))})"
    with progress_bar("reading tables", len(files), unit="files") as progress:
        for file in files:
            starts.append(num_rows)
            rows = iter(table.rows(file))
            while block := list(itertools.islice(rows, ROWS_AT_ONCE)):
                database.executemany(
                    insert, [(number, place, *cells) for number, (place, cells) in enumerate(block, start=num_rows)]
                )
                digest.update(b"".join(map(table.digest, block)))
                num_rows += len(block)
                progress.advance(0, note=f"{num_rows:,} rows")
            progress.advance(1)
    return digest.hexdigest(), num_rows, starts


def _shared_places(database: sqlite3.Connection) -> SharedPlaces:
    """Yield the rows of each place that several rows name, in the order of their first ones."""
    query = "SELECT place FROM rows WHERE place NOT NULL GROUP BY place HAVING count(*) > 1 ORDER BY min(number)"
    for (place,) in database.execute(query):
        rows = database.execute("SELECT * FROM rows WHERE place = ? ORDER BY number", (place,))
        yield [_indexed(row) for row in rows]


def _read_facts(database: sqlite3.Connection, version: int) -> IndexFacts:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found != version:
        raise ValueError(f"version {found}")
    (content,) = database.execute("SELECT content FROM facts").fetchone()
    facts = json.loads(content)
    return IndexFacts(**{**facts, "files": [IndexedFile(**file) for file in facts["files"]]})


def _indexed(row: tuple[Any, ...]) -> IndexedRow:
    return IndexedRow(row[0], row[1], row[2:])
