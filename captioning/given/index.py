"""Texts of a source by the place of their image, in a database on disk: built once, read by every worker.

`RUN/.texts/<name>.sqlite` is a copy of what the source says and can be deleted at any time. It counts only while the
files of the source are the same; memory is bounded, however many rows there are.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from captioning.given.addresses import TextAddress, find_files
from captioning.given.sources import NO_TEXT, read_rows, stamp_of
from errors import UserError
from pipelines.engine.progress import get_logger, progress_bar
from pipelines.raw.tables.places import beginnings, choose_rows
from pipelines.store.files import atomic_file, discard, is_remote, remove_temporary_files, sha256_text

FOLDER = ".texts"
# Raised when rows are read or placed in another way.
FORMAT_VERSION = 3
ROWS_AT_ONCE = 10_000
CACHE_KIBIBYTES, MAPPED_BYTES = 200_000, 1 << 40
# Of rows below a sample's place: more are of as many images in other folders.
MAX_CANDIDATES = 100
NO_CAPTION, AMBIGUOUS = "no_caption", "ambiguous_caption"
MAX_NAMED = 3

log = get_logger("captioning")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source of texts: its number, the place it names, and its text or what is wrong with it."""

    number: int
    place: str
    text: str | None
    fault: str | None


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What is known of an index without a look at its rows.

    Attributes:
        identity: hash over places, texts and faults of all rows, in order.
        num_faults: rows by what is wrong with them.
        contested: some places that several rows have with different texts.
        files: paths with their stamps, and how many rows came before.
    """

    identity: str
    num_rows: int
    num_faults: dict[str, int]
    contested: list[str]
    files: list[tuple[str, str | None, int]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a source says of a sample: a text with the number of its row, or why there is none."""

    text: str | None = None
    fault: str | None = None
    number: int | None = None


class TextIndex:
    """An open index, for any thread."""

    def __init__(self, path: Path) -> None:
        # Nobody writes it: without locks, which shared storage may not have.
        address = f"file:{quote(str(path))}?mode=ro&immutable=1"
        self._database = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._database.execute(f"PRAGMA mmap_size={MAPPED_BYTES}")
        self._one_at_a_time = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def facts(self) -> IndexFacts:
        """Return what was found when it was built.

        Raises:
            sqlite3.Error, ValueError, TypeError: it is damaged or of another version.
        """
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version}")
        (content,) = self._database.execute("SELECT content FROM facts").fetchone()
        facts = json.loads(content)
        return IndexFacts(**{**facts, "files": [tuple(file) for file in facts["files"]]})

    def example(self) -> str:
        """Return the name that the first row has which names something."""
        row = self._database.execute("SELECT place FROM rows WHERE place NOT NULL LIMIT 1").fetchone()
        return _name(row[0]) if row else ""

    def find(self, places: Sequence[str]) -> Found:
        """Return what there is for a sample, at the first of its places that has rows, see `sample_places`."""
        found = ((place, self._candidates(place)) for place in places)
        place, rows = next(((place, rows) for place, rows in found if rows), ("", []))
        if not rows:
            return Found(fault=NO_CAPTION)
        best = choose_rows(rows, place)
        first = best[0]
        if any((row.text, row.fault) != (first.text, first.fault) for row in best):
            return Found(fault=AMBIGUOUS)
        fault = NO_CAPTION if first.fault == NO_TEXT else first.fault
        return Found(text=first.text, fault=fault, number=first.number)

    def _candidates(self, place: str) -> list[Row]:
        # The shard alone is no place of a sample.
        key, shorter = place.rpartition("/")[0], beginnings(place)
        marks = ",".join("?" * len(shorter))
        query = (
            f"SELECT number, place, text, fault FROM rows WHERE place IN ({marks}) UNION ALL "
            "SELECT * FROM (SELECT number, place, text, fault FROM rows WHERE place > ? AND place < ? LIMIT ?)"
        )
        with self._one_at_a_time:
            # "0" comes after "/".
            values = (*shorter, f"{key}/", f"{key}0", MAX_CANDIDATES)
            found = self._database.execute(query, values).fetchall()
        return [Row(*row) for row in sorted(set(found))]


def open_index(address: TextAddress, run: Path) -> tuple[Path, IndexFacts]:
    """Return the index of an address, built if it is not there or a file of the address has changed.

    Raises:
        MissingFileError, UserError, StorageError: a file is missing, cannot be read or lacks a column; names it.
    """
    files = find_files(address)
    places = [file if is_remote(file) else str(Path(file).absolute()) for file in files]
    name = sha256_text(json.dumps([places, address.key_column, address.text_column]))[:24]
    path = run.absolute() / FOLDER / f"{name}.sqlite"
    stamps = [stamp_of(file) for file in files]
    facts = _recall(path)
    if facts is None or None in stamps or [stamp for _, stamp, _ in facts.files] != stamps:
        with atomic_file(path) as temporary:
            facts = _build(address, files, stamps, temporary)
    if not facts.num_rows:
        named = f" that has a text {address.text_column!r}" if address.text_column else ""
        raise UserError(f"{address.key}: there is no row in it{named}")
    _say_faults(address, facts)
    return path, facts


def forget_indexes(run: Path, kept: Sequence[Path]) -> None:
    """Remove the indexes of a run that its recipe has no use for, and what killed commands have left of some."""
    remove_temporary_files(run / FOLDER)
    for path in (run / FOLDER).glob("*.sqlite"):
        if path.absolute() not in kept:
            discard(path)


def _recall(path: Path) -> IndexFacts | None:
    if not path.is_file():
        return None
    try:
        index = TextIndex(path)
        try:
            return index.facts()
        finally:
            index.close()
    except (sqlite3.Error, ValueError, TypeError) as error:
        log.warning(f"{path} is damaged or of another version ({error}): its texts are read again")
        return None


def _build(address: TextAddress, files: Sequence[str], stamps: Sequence[str | None], path: Path) -> IndexFacts:
    database = sqlite3.connect(path, isolation_level=None)
    try:
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIBIBYTES}"):
            database.execute(f"PRAGMA {setting}")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, place TEXT, text TEXT, fault TEXT)")
        database.execute("BEGIN")
        digest, faults, starts = hashlib.sha256(), dict[str, int](), list[int]()
        num_rows = 0
        with progress_bar("captioning texts", len(files), unit="files") as progress:
            for file in files:
                starts.append(num_rows)
                for rows in _numbered(address, file, num_rows):
                    database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
                    num_rows += len(rows)
                    for _, place, text, fault in rows:
                        digest.update(f"{place}\0{text}\0{fault}\n".encode())
                        if fault is not None:
                            faults[fault] = faults.get(fault, 0) + 1
                    progress.advance(0, note=f"{num_rows:,} rows")
                progress.advance(1)
        database.execute("CREATE INDEX places ON rows (place)")
        facts = IndexFacts(
            identity=digest.hexdigest(),
            num_rows=num_rows,
            num_faults=dict(sorted(faults.items())),
            contested=_contested(database, files, starts),
            files=list(zip(files, stamps, starts, strict=True)),
        )
        database.execute("CREATE TABLE facts (content TEXT)")
        database.execute("INSERT INTO facts VALUES (?)", (json.dumps(asdict(facts)),))
        database.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        database.execute("COMMIT")
    finally:
        database.close()
    return facts


def _numbered(
    address: TextAddress, file: str, first: int
) -> Iterator[list[tuple[int, str | None, str | None, str | None]]]:
    block = []
    for number, row in enumerate(read_rows(address, file), start=first):
        block.append((number, row.place, row.text, row.fault))
        if len(block) == ROWS_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def _contested(database: sqlite3.Connection, files: Sequence[str], starts: Sequence[int]) -> list[str]:
    """Return sentences about the first places that have several rows with different texts."""
    shared = database.execute("SELECT place FROM rows WHERE place NOT NULL GROUP BY place HAVING count(*) > 1")
    found: list[str] = []
    for (place,) in shared:
        rows = database.execute("SELECT number, text FROM rows WHERE place = ? ORDER BY number", (place,)).fetchall()
        other = next((row for row in rows if row[1] != rows[0][1]), None)
        if other is not None:
            found.append(f"{_name(place)}: {_where(rows[0][0], files, starts)} and {_where(other[0], files, starts)}")
        if len(found) == MAX_NAMED:
            break
    return found


def _name(place: str) -> str:
    return "/".join(reversed(place.split("/")))


def _where(number: int, files: Sequence[str], starts: Sequence[int]) -> str:
    file, start = [pair for pair in zip(files, starts, strict=True) if pair[1] <= number][-1]
    return f"row {number - start + 1:,} of {file}"


def _say_faults(address: TextAddress, facts: IndexFacts) -> None:
    if facts.num_faults:
        faults = ", ".join(f"{fault} {count:,}" for fault, count in facts.num_faults.items())
        log.warning(
            f"{address.key}: {sum(facts.num_faults.values()):,} of {facts.num_rows:,} rows have no text: {faults}"
        )
    if facts.contested:
        log.warning(f"{address.key}: keys with different texts are {AMBIGUOUS}, such as {'; '.join(facts.contested)}")
