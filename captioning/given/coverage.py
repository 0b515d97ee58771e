"""Whether tables of captions and samples fit each other, found out before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.given.addresses import TextAddress, read_addresses
from captioning.given.index import AMBIGUOUS, TextIndex, open_index
from captioning.given.loader import GivenColumn
from captioning.given.rivals import RivalKeys
from errors import UserError
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger, progress_bar
from pipelines.raw.reading import Reading
from pipelines.raw.shards import open_shard
from pipelines.raw.tables.places import sample_places
from pipelines.raw.tables.row_index import IndexFacts

NAMED = 3

log = get_logger("captioning")


@dataclass(frozen=True, kw_only=True)
class GivenSource:
    """A column's address, the index of its texts and what that says of itself; a sample's own text has none."""

    address: TextAddress
    index: Path | None = None
    facts: IndexFacts | None = None

    @property
    def name(self) -> str:
        """The column."""
        return self.address.column

    @property
    def column(self) -> GivenColumn:
        """What workers are told."""
        return GivenColumn(name=self.name, own=self.address.own, index=self.index)

    @property
    def identity(self) -> str:
        """What decides the texts beside the samples' own files."""
        return self.facts.identity if self.facts is not None else f"#{self.address.own}"

    def describe(self) -> str:
        """Return what a person would call it."""
        if self.facts is None:
            name = f"the text {self.address.own!r}" if self.address.own else "the text"
            return f"{self.name}: {name} that came with each image"
        return f"{self.name}: {self.facts.num_rows:,} rows of {self.address.text}"


def open_sources(table: str | dict[str, str], run: Path) -> list[GivenSource]:
    """Return the sources of `captioning.table`, with indexes that are built where they are missing or old.

    Raises:
        MissingFileError, UserError, StorageError: a file is missing, cannot be read or lacks a column; names it.
    """
    sources = []
    for address in read_addresses(table, run):
        if address.own is not None:
            sources.append(GivenSource(address=address))
            continue
        index, facts = open_index(address, run)
        sources.append(GivenSource(address=address, index=index, facts=facts))
    return sources


def check_coverage(given: Sequence[GivenSource], sources: Sequence[Source], *, reading: Reading, run: Path) -> None:
    """Say how many samples have no row in a table, and how many rows no sample.

    Raises:
        UserError: a table has a row for none of the samples, or one row for several of them; names some.
    """
    for source in given:
        if source.index is not None and source.facts is not None:
            _check_index(source, source.index, source.facts, sources, reading=reading, run=run)


def _check_index(
    given: GivenSource,
    path: Path,
    facts: IndexFacts,
    sources: Sequence[Source],
    *,
    reading: Reading,
    run: Path,
) -> None:
    key, index = given.address.key, TextIndex(path)
    # By row, the number of the shard that has its sample; enough to name both.
    owners = np.zeros(facts.num_rows, dtype=np.int32)
    num_samples = num_missing = num_ambiguous = 0
    missing: list[str] = []
    rivals = RivalKeys(given.address, facts.files[0].path)
    with progress_bar("captioning keys", sum(source.num_samples for source in sources)) as progress:
        for shard_number, source in enumerate(sources, start=1):
            with open_shard(source.path, reading, run=run, identity=source.identity) as raw:
                names = [(sample.key, sample_places(raw.name, sample.key)) for sample in raw.samples]
            for name, places in names:
                found = index.find(places)
                num_samples += 1
                num_ambiguous += found.fault == AMBIGUOUS
                if found.number is not None:
                    rivals.require_same(f"{source.name}/{name}", places, found.number)
                    _claim(owners, found.number, shard_number, sample=f"{source.name}/{name}", sources=sources, key=key)
                elif found.fault != AMBIGUOUS:
                    num_missing += 1
                    missing += [f"{source.name}/{name}"] if len(missing) < NAMED else []
            progress.advance(len(names))
    num_unused = int((owners == 0).sum())
    example = index.example()
    index.close()
    if num_samples and num_unused == facts.num_rows and not num_ambiguous:
        raise UserError(
            f"{key}: none of its {facts.num_rows:,} rows is of one of the {num_samples:,} samples: its keys are like "
            f"{example!r}, those of samples like {missing[0]!r}"
        )
    counts = [
        (num_missing, f"{num_missing:,} of {num_samples:,} samples have no row, such as {', '.join(missing)}"),
        (num_ambiguous, f"{num_ambiguous:,} samples have several rows with different texts"),
        (num_unused, f"{num_unused:,} of {facts.num_rows:,} rows are used by no sample, or say what another row says"),
    ]
    if said := "; ".join(text for count, text in counts if count):
        log.warning(f"{key}: {said}")


def _claim(
    owners: np.ndarray, row: int, shard_number: int, *, sample: str, sources: Sequence[Source], key: str
) -> None:
    if owners[row]:
        other = sources[owners[row] - 1].name
        mend = (
            f"keys that several of its folders have are written with the folder, such as {sample.partition('/')[2]}"
            if other == sources[shard_number - 1].name
            else "keys that several shards have are written as shard/key"
        )
        raise UserError(f"{key}: row {row + 1:,} is of {sample} and of a sample of shard {other} alike: {mend}")
    owners[row] = shard_number
