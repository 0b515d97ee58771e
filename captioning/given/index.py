"""Texts of a source by the place of their image: `RUN/.texts/<name>.sqlite`, see `pipelines.raw.tables.row_index`."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.given.addresses import TextAddress, find_files
from captioning.given.sources import NO_TEXT, read_rows, stamp_of
from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.tables.places import choose_rows
from pipelines.raw.tables.row_index import IndexFacts, NewRow, RowIndex, SharedPlaces, TableToIndex, Where, open_facts
from pipelines.store.files import discard, is_remote, remove_temporary_files, sha256_text

FOLDER = ".texts"
FORMAT_VERSION = 4
NO_CAPTION, AMBIGUOUS = "no_caption", "ambiguous_caption"
MAX_NAMED = 3

log = get_logger("captioning")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a source says of a sample: a text with the number of its row, or why there is none."""

    text: str | None = None
    fault: str | None = None
    number: int | None = None


class TextIndex:
    """An open index, for any thread; the cells of a row are its text, and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """Open a file; raises as `RowIndex`."""
        self._index = RowIndex(path, version=FORMAT_VERSION)

    def close(self) -> None:
        """Close the file."""
        self._index.close()

    def example(self) -> str:
        """Return the name that the first row has which names something."""
        place = self._index.first_place()
        return "" if place is None else _name(place)

    def find(self, places: Sequence[str]) -> Found:
        """Return what there is for a sample, at the first of its places that has rows, see `sample_places`."""
        found = ((place, self._index.candidates(place)) for place in places)
        place, rows = next(((place, rows) for place, rows in found if rows), ("", []))
        if not rows:
            return Found(fault=NO_CAPTION)
        best = choose_rows(rows, place)
        if any(row.cells != best[0].cells for row in best):
            return Found(fault=AMBIGUOUS)
        text, fault = best[0].cells
        return Found(text=text, fault=NO_CAPTION if fault == NO_TEXT else fault, number=best[0].number)


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
    facts = open_facts(path, files, stamps, version=FORMAT_VERSION, table=lambda: _table(address))
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


def _table(address: TextAddress) -> TableToIndex:
    faults: Counter[str] = Counter()

    def rows(file: str) -> Iterator[NewRow]:
        for row in read_rows(address, file):
            if row.fault is not None:
                faults[row.fault] += 1
            yield row.place, (row.text, row.fault)

    def own(shared: SharedPlaces, where: Where) -> Mapping[str, Any]:
        return {"num_faults": dict(sorted(faults.items())), "contested": _contested(shared, where)}

    return TableToIndex(columns=("text", "fault"), rows=rows, digest=_digest, own=own)


def _digest(row: NewRow) -> bytes:
    place, (text, fault) = row
    return f"{place}\0{text}\0{fault}\n".encode()


def _contested(shared: SharedPlaces, where: Where) -> list[str]:
    """Return sentences about the first places that have several rows with different texts."""
    found: list[str] = []
    for first, *others in shared:
        other = next((row for row in others if row.cells[0] != first.cells[0]), None)
        if other is not None:
            found.append(f"{_name(first.place)}: {where(first.number)} and {where(other.number)}")
        if len(found) == MAX_NAMED:
            break
    return found


def _name(place: str) -> str:
    return "/".join(reversed(place.split("/")))


def _say_faults(address: TextAddress, facts: IndexFacts) -> None:
    num_faults, contested = facts.own["num_faults"], facts.own["contested"]
    if num_faults:
        faults = ", ".join(f"{fault} {count:,}" for fault, count in num_faults.items())
        log.warning(f"{address.key}: {sum(num_faults.values()):,} of {facts.num_rows:,} rows have no text: {faults}")
    if contested:
        log.warning(f"{address.key}: keys with different texts are {AMBIGUOUS}, such as {'; '.join(contested)}")
