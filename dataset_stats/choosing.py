"""Sets with a `where`: which rows they keep, and the sets that they are compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataset_stats.captions import Address, RowSample
from dataset_stats.config import CaptionSet
from dataset_stats.file_columns import FileColumns
from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.columns.choice_counts import ChoiceCounts
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice, require_some
from pipelines.columns.sample_columns import SampleColumns
from pipelines.engine.pieces import Source
from pipelines.store.files import sha256_text
from pipelines.store.tables import MEND_SHARD, read_table

SECTION = "dataset_stats.sets"
ALL_OF = ".all"  # what ends the name of a set that is counted for comparison alone
NAME_ENDING = ".nouns"
OF_SAMPLES, OF_FILES = ("captions", "raw"), "parquet"


@dataclass(frozen=True, kw_only=True)
class SetChoice:
    """The `where` of a set, and the shards that it chooses from.

    Attributes:
        before: the set that it is compared with: the same shards and column, without `where`.
    """

    name: str
    before: str
    choice: Choice
    shards: Sequence[str]

    def hashes(self) -> dict[str, dict[str, str]]:
        """Return what decides which rows are kept, beside the expression: hashes of columns by shard and folder."""
        return {shard: self.choice.hashes(shard) for shard in self.shards}

    def evaluate(self, sources: Sequence[Source]) -> ChosenRows:
        """Return which rows are kept of each of the set's sources, which are cut down where there is a sample.

        Raises:
            UserError: nothing is kept, with the counts of each clause; or columns are damaged or of other samples.
        """
        addresses = {_shard_of(address := Address.parse(source.path)): address for source in sources}
        counts, rows = [], {}
        for found in self.choice.evaluate_each(self.shards):
            counts.append(found.counts)
            if found.shard in addresses:
                keys = found.keys if addresses[found.shard].layout in OF_SAMPLES else None
                rows[found.shard] = _Rows.of(keys, found.chosen, addresses[found.shard].sample)
        total = require_some(counts, self.choice)
        return ChosenRows(set_choice=self, counts=total, by_shard=[rows[shard] for shard in addresses])


@dataclass(frozen=True)
class _Rows:
    """Rows of a source: eight to a byte whether they are kept, how many there are, and a hash of their keys.

    Rows that are chosen by columns of their own file have no hash.
    """

    bits: np.ndarray
    num_rows: int
    keys: str | None

    @classmethod
    def of(cls, keys: pa.ChunkedArray | None, chosen: np.ndarray, sample: RowSample | None) -> _Rows:
        if sample is not None and sample.num_rows == len(chosen):
            drawn = sample.rows()
            keys, chosen = None if keys is None else keys.take(pa.array(drawn)), chosen[drawn]
        return cls(np.packbits(chosen), len(chosen), None if keys is None else _hash_of_keys(keys))


@dataclass(frozen=True, kw_only=True)
class ChosenRows:
    """The rows that a set's `where` keeps, of each of its sources in order; `counts` are of whole shards."""

    set_choice: SetChoice
    counts: ChoiceCounts
    by_shard: Sequence[_Rows]

    def __call__(self, number: int) -> np.ndarray:
        """Return which rows of a source are kept, bool [num_rows]."""
        rows = self.by_shard[number]
        return np.unpackbits(rows.bits, count=rows.num_rows).astype(bool)

    def require_same_samples(self, files: Sequence[Path]) -> None:
        """Raise a UserError where counted captions are not of the samples that the columns are of."""
        for path, rows in zip(files, self.by_shard, strict=True):
            if rows.keys is not None and _hash_of_keys(read_table(path, ["key"], mend=MEND_SHARD)["key"]) != rows.keys:
                choice = self.set_choice.choice
                raise UserError(
                    f"{choice.settings.key('where')}: its columns are not of the same samples as the captions of "
                    f"{path.name}: `{typed_command('verify', {'run': choice.run})}` tells which are old"
                )


class SetChoices:
    """The sets of a recipe that have a `where`, by name."""

    def __init__(self, run: Path, sets: Mapping[str, CaptionSet]) -> None:
        self._run = run
        self._sets = {name: found for name, found in sets.items() if found.where is not None}
        self._settings = {
            name: ChoiceSettings(table=name, where=found.where, section=SECTION) for name, found in self._sets.items()
        }
        for settings in self._settings.values():
            _ = settings.where_expression  # what is wrong with it is said before anything else is looked at

    @cached_property
    def _columns(self) -> SampleColumns:
        return SampleColumns(self._run)

    def of_sources(self, sources: Mapping[str, Sequence[Source]]) -> dict[str, SetChoice]:
        """Return the choices over sources that have been found, checked.

        Raises:
            UserError: as `Choice.check`.
        """
        found = {}
        for name, settings in self._settings.items():
            addresses = [Address.parse(source.path) for source in sources[name]]
            columns = self._columns if self._sets[name].has_samples else FileColumns(self._run)
            if other := next((each for each in addresses if each.layout not in (*OF_SAMPLES, OF_FILES)), None):
                raise UserError(
                    f"{settings.key('where')}: {other.path} has no columns with types: a set with where is of "
                    'RUN/captions, of raw shards of the run (layout = "raw"), or of Parquet files, by their own columns'
                )
            choice = Choice(self._run, settings, columns=columns)
            shards = [_shard_of(address) for address in addresses]
            choice.check(shards)
            before = next(other for other in sources if other not in self._sets and sources[other] == sources[name])
            found[name] = SetChoice(name=name, before=before, choice=choice, shards=shards)
        return found

    def with_befores(self, sources: Mapping[str, list[Source]]) -> dict[str, list[Source]]:
        """Return sources by set, with a set of all samples before each set that no other one can be compared with."""
        found: dict[str, list[Source]] = {}
        for name, own in sources.items():
            others = {**sources, **found}
            if name in self._sets and not any(own == others[other] for other in others if other not in self._sets):
                found[_free_name(f"{name}{ALL_OF}", {*sources, *found})] = own
            found[name] = own
        return found

    def keeping_nouns(self, sources: Mapping[str, list[Source]]) -> dict[str, list[Source]]:
        """Return sources by set: counts that some set chooses from list each caption's nouns, for all of its sets.

        Then another `where` counts nothing anew.
        """
        of_choices = {source.name for name in self._sets for source in sources[name]}
        return {
            name: [_keeping_nouns(source) if source.name in of_choices else source for source in own]
            for name, own in sources.items()
        }


def _free_name(name: str, taken: Collection[str]) -> str:
    """The name, or, where the recipe has a set of that name, the first longer one that none has."""
    return _free_name(f"{name}{ALL_OF}", taken) if name in taken else name


def _shard_of(address: Address) -> str:
    """What a choice calls a source: the run's shards by their names, other files by their paths."""
    return address.shard if address.layout in OF_SAMPLES else address.path


def _keeping_nouns(source: Source) -> Source:
    address = replace(Address.parse(source.path), keeps_nouns=True)
    return replace(source, name=f"{source.name}{NAME_ENDING}", path=str(address))


def _hash_of_keys(keys: pa.ChunkedArray) -> str:
    return sha256_text("\n".join(keys.to_pylist()))
