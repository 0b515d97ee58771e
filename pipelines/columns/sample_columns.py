"""The columns that a run has about its samples: captions, other passes of captions, and scores; read by dotted name.

min_side, pixels.min_side       of columns/pixels
num_tokens, flags.loop          of captions
short, short.num_tokens         of captions@short, whose `caption` is called `short`
short.clip_score                of columns/clip_score@short, or else of captions@short
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.columns.columns_folders import FLAGS, MAIN_CAPTION, ColumnsFolder, FoundFolders, find_folders
from pipelines.columns.expressions import Expression, Kind
from pipelines.columns.known_scores import CAPTION_KEYS, KNOWN_SCORES, score_command, score_of_column
from pipelines.store.tables import MEND_SHARD, read_table

# They are in every file, and so of no folder.
OF_ALL = {"key": pa.string(), "shard": pa.string()}
SHARDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a name's values are: a column of a folder; `flags.loop` is the flag `loop` of its column `flags`."""

    folder: ColumnsFolder
    column: str

    @property
    def type(self) -> pa.DataType:
        return self.folder.columns[self.column]

    @property
    def qualified(self) -> str:
        prefix = "" if self.folder.caption == MAIN_CAPTION else f"{self.folder.caption}."
        return f"{prefix}{self.folder.score}.{self.column}"

    @property
    def stored(self) -> str:
        """The column of the file."""
        return self.column.partition(".")[0]

    def values(self, table: pa.Table) -> pa.ChunkedArray:
        column = table[self.stored]
        if self.folder.score is None:
            # Of a sample that is rejected captions have the alt text, too, and a list without flags.
            column = pc.call_function("if_else", [table["reject"].is_null(), column, pa.scalar(None, column.type)])
        return column if self.column == self.stored else _has_flag(column, self.column.removeprefix(f"{FLAGS}."))


class SampleColumns:
    """All columns of the samples of a run, by dotted name; reads what is there once, when it is first asked."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._places_of: dict[str, dict[str, list[_Place]]] = {}

    @cached_property
    def _found(self) -> FoundFolders:
        return find_folders(self._run)

    @property
    def folders(self) -> list[ColumnsFolder]:
        """The finished folders of columns, captions first; raises as `find_folders` does."""
        return self._found.finished

    def schema(self, *, caption: str = MAIN_CAPTION) -> pa.Schema:
        """Return every name that means one column, with its type; `key` and `shard` come first.

        Args:
            caption: bare names mean this caption column's own columns first, as they do in its weight, and never what
                scores say of the main one.
        """
        places = self._places(caption)
        return pa.schema(OF_ALL | {name: found[0].type for name, found in places.items() if len(found) == 1})

    def check(self, expression: Expression, wants: Kind, *, shards: Iterable[str], caption: str = MAIN_CAPTION) -> None:
        """Find, before anything runs, whether an expression can be evaluated for some shards.

        Args:
            expression: of the recipe.
            wants: what it should give.
            shards: names.
            caption: as in `schema`.

        Raises:
            UserError: a name means nothing, or more than one column; a column has not been made, or not for all of the
                shards: then with the command that makes it; or types do not fit. Names the key of the recipe.
        """
        places = self._places(caption)
        for name in expression.names:
            if name not in OF_ALL:
                self._require_known(name, places, key=expression.key, caption=caption)
        expression.check(self.schema(caption=caption), wants)
        names = sorted(shards)
        for folder, needed in self._by_folder(expression.names, places):
            if missing := [shard for shard in names if shard not in folder.manifest.shards]:
                more = f" and {len(missing) - SHARDS_SHOWN:,} more" if len(missing) > SHARDS_SHOWN else ""
                shown = ", ".join(needed) or "keys"
                raise UserError(
                    f"{expression.key}: {folder.path}, which has {shown}, lacks {len(missing):,} of {len(names):,} "
                    f"shards: {', '.join(missing[:SHARDS_SHOWN])}{more}; {folder.command} makes them"
                )

    def read(self, shard: str, names: Sequence[str], *, caption: str = MAIN_CAPTION) -> pa.Table:
        """Return `key` and the columns of `names` of a shard, one row per sample of it, in raw order.

        Of samples that a score or the captions have rejected their columns are null.

        Raises:
            UserError: a file is missing or damaged, or two files are not of the same samples; names them.
            KeyError: a name means no column, which `check` says before.
        """
        keys, keys_of = None, None
        found: dict[str, pa.ChunkedArray] = {}
        for folder, needed in self._by_folder(names, self._places(caption)):
            path = folder.file(shard)
            reject = ["reject"] if folder.score is None else []
            stored = {place.stored: None for place in needed.values()}
            table = read_table(path, ["key", *reject, *stored], mend=MEND_SHARD)
            if keys is None or keys_of is None:
                keys, keys_of = table["key"], path
            elif not keys.equals(table["key"]):
                raise UserError(_other_samples(path, table["key"], keys_of, keys, folder=folder))
            found |= {name: place.values(table) for name, place in needed.items()}
        assert keys is not None, "there is always a folder"
        found |= {"key": keys, "shard": pa.chunked_array([pa.repeat(shard, len(keys))])}
        return pa.table({name: found[name] for name in ("key", *names)})

    def hashes(self, shard: str, names: Sequence[str], *, caption: str = MAIN_CAPTION) -> dict[str, str]:
        """Return, by the names of their folders, the SHA-256 of each file that `read` reads."""
        folders = [folder for folder, _ in self._by_folder(names, self._places(caption))]
        return {folder.name: folder.manifest.shards[shard].files[".parquet"] for folder in folders}

    def what_would_make(self, name: str) -> str | None:
        """Return the command of the score that has a column of this name, where captions alone have one yet."""
        found = self._places(MAIN_CAPTION).get(name, ())
        score = score_of_column(name)
        is_of_captions = bool(found) and all(place.folder.score is None for place in found)
        return score_command(score, self._run) if is_of_captions and score else None

    def _require_known(
        self, name: str, places: Mapping[str, Sequence[_Place]], *, key: str, caption: str = MAIN_CAPTION
    ) -> None:
        found = places.get(name, ())
        if len(found) > 1:
            both = " or ".join(place.qualified for place in found)
            raise UserError(f"{key}: {name} is a column of {len(found)} scores: write {both}")
        if found:
            return
        missing = f"{key}: there is no column {name!r}"
        if score := score_of_column(name):
            first = name.partition(".")[0]
            about = caption if first in (name, score) else first
            command = score_command(score, self._run, caption=None if about == MAIN_CAPTION else about)
            raise UserError(f"{missing} yet: {command} makes it")
        if self._found.unfinished:
            folder, command = next(iter(self._found.unfinished.items()))
            raise UserError(f"{missing}; {self._run / folder} has not finished: {command} goes on with it")
        if not places:
            raise UserError(
                f"{missing}: {self._run} has neither captions nor other columns of its samples; "
                f"{score_command('pixels', self._run)} makes some"
            )
        near = did_you_mean(name, places)
        if f"{FLAGS}." in name and (captions := [folder for folder in self.folders if folder.score is None]):
            again = f"captions of an older version get today's flags by {captions[0].command}, which asks no model"
            raise UserError(f"{missing}{near}; {again}")
        known = {column: score for score, columns in KNOWN_SCORES.items() for column in columns}
        if not near and (other := did_you_mean(name, known)):
            raise UserError(f"{missing}{other}")

    def _places(self, caption: str) -> dict[str, list[_Place]]:
        if caption not in self._places_of:
            self._places_of[caption] = self._find_places(caption)
        return self._places_of[caption]

    def _find_places(self, caption: str) -> dict[str, list[_Place]]:
        """Return what each name may mean: columns of scores, or where no score has it, of captions."""
        of_captions: dict[str, list[_Place]] = {}
        of_scores: dict[str, list[_Place]] = {}
        for folder in self.folders:
            prefix = "" if folder.caption == MAIN_CAPTION else f"{folder.caption}."
            for column in folder.columns:
                place = _Place(folder=folder, column=column)
                if folder.score is None:
                    of_captions[f"{prefix}{column}"] = [place]
                    if prefix and column == MAIN_CAPTION:
                        of_captions[folder.caption] = [place]
                else:
                    for name in (column, f"{folder.score}.{column}"):
                        of_scores.setdefault(f"{prefix}{name}", []).append(place)
        places = of_captions | of_scores
        if caption != MAIN_CAPTION:
            start = f"{caption}."
            # What scores say of one caption they do not say of another.
            places = {
                name: found
                for name, found in places.items()
                if score_of_column(name) not in CAPTION_KEYS or found[0].folder.caption != MAIN_CAPTION
            }
            places |= {name.removeprefix(start): found for name, found in places.items() if name.startswith(start)}
        return places

    def _by_folder(
        self, names: Sequence[str], places: Mapping[str, Sequence[_Place]]
    ) -> list[tuple[ColumnsFolder, dict[str, _Place]]]:
        """Return the folders that names are of, with their places; for keys alone it is the first there is."""
        found: dict[str, tuple[ColumnsFolder, dict[str, _Place]]] = {}
        for name in names:
            if name not in OF_ALL:
                place = places[name][0]
                found.setdefault(place.folder.name, (place.folder, {}))[1][name] = place
        return list(found.values()) or [(folder, {}) for folder in self.folders[:1]]


def _has_flag(flags: pa.ChunkedArray, flag: str) -> pa.ChunkedArray:
    """Return whether each list of flags has one; null where there is no list."""
    lists = pa.chunked_array(flags.chunks, flags.type).combine_chunks()
    lists = lists if isinstance(lists, pa.Array) else pa.concat_arrays(lists.chunks)
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False) == flag, bool)
    counts = np.asarray(lists.value_lengths().fill_null(0))
    rows = np.repeat(np.arange(len(lists)), counts)
    has = np.zeros(len(lists), bool)
    has[rows[values]] = True
    return pa.chunked_array([pa.array(has, mask=np.asarray(lists.is_null()))])


def _other_samples(
    path: Path, keys: pa.ChunkedArray, others_of: Path, others: pa.ChunkedArray, *, folder: ColumnsFolder
) -> str:
    """Return what is said of two files of a shard that are not of the same samples."""
    first, second = keys.to_pylist(), others.to_pylist()
    row = next((row for row, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    if row is None:
        told = f"{len(first):,} and {len(second):,} samples"
    else:
        told = f"in row {row + 1:,} {first[row]!r} and {second[row]!r}"
    return (
        f"{path} and {others_of} are not of the same samples: they have {told}; one was made before the raw shard "
        f"changed: {folder.command} and the command that makes the other make what is old anew"
    )
