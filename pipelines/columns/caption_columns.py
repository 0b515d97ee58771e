"""The captions of a run by the name of their column: in `captions/`, or of a pass in `captions@<name>/`.

What is there is what a recipe may name: the captions themselves (`caption`), other texts beside them, passes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from errors import MissingFileError, UserError
from pipelines.as_typed import did_you_mean, typed_command, typed_flag
from pipelines.columns.columns_folders import CAPTIONS, COLUMNS, MAIN_CAPTION
from pipelines.engine.pieces import Source
from pipelines.store.families import texts_digest
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, manifest_path, read_manifest, require_same
from pipelines.store.tables import read_table_schema

# Columns of captions that say what a row is of, and what became of it.
NO_TEXTS = ("key", "shard", "prompt", "finish_reason", "reject")
MAX_NAMED = 3
# Between the identity of a raw shard and the hashes of what a cut of captions was made of; no identity holds one.
CAPTIONS_SEAM, CLAIMS_SEAM = "+captions:", "+claims:"
SEAM = re.compile(rf"{re.escape(CLAIMS_SEAM)}|{re.escape(CAPTIONS_SEAM)}")


@dataclass(frozen=True, kw_only=True)
class CaptionColumn:
    """A column of captions: what it is called in recipes, the folder it lies in, its manifest, and its name there."""

    name: str
    folder: Path
    manifest: Manifest
    column: str

    def file(self, shard: str) -> Path:
        """Return where a shard's captions are."""
        return self.folder / f"{shard}.parquet"

    def sha256(self, shard: str) -> str:
        """Return the hash that the manifest has of that file."""
        return self.manifest.shards[shard].files[".parquet"]

    @property
    def cut_of(self) -> str | None:
        """The column of captions that it was cut of."""
        return self.manifest.extra.get("of")


def captions_folder(run: Path, column: str = MAIN_CAPTION) -> Path:
    """Return the folder of the captions themselves, or of those of a pass."""
    return run / (CAPTIONS if column == MAIN_CAPTION else f"{CAPTIONS}@{column}")


def is_beside_captions(run: Path, name: str) -> bool:
    """Return whether texts of a name are a column of `captions/` itself, by a shard that is done, and no pass."""
    done = ShardDirectory(captions_folder(run)).marked()
    if captions_folder(run, name).is_dir() or not done:
        return False
    return name in read_table_schema(captions_folder(run) / f"{done[0]}.parquet", mend=mend_captions()).names


def claims_folder(run: Path, column: str) -> Path:
    """Return the folder of the claims of a column of captions."""
    return run / COLUMNS / ("claims" if column == MAIN_CAPTION else f"claims@{column}")


def mend_captions() -> str:
    """Return what to do about a shard's captions that cannot be used."""
    return f"remove it and type `{typed_command('caption')}` again: this shard alone is captioned anew"


def raw_identity(source: str) -> str:
    """Return the identity of the raw shard, of the `source` of a shard of captions."""
    return SEAM.split(source)[0]


def _of_its_own(column: CaptionColumn) -> str:
    """Return where a pass may have shards of its own, which no command goes beyond."""
    table = f"captioning.passes.{column.name}"
    return (
        "" if column.folder.name == CAPTIONS else f"; where {table}.shards leaves them out, change it or leave them out"
    )


class RunCaptions:
    """The captions of a run; manifests are read once."""

    def __init__(self, run: Path, manifests: Mapping[Path, Manifest] | None = None) -> None:
        """With `manifests`, by their folders, no others are looked for."""
        self.run = run
        self._manifests: dict[Path, Manifest] = dict(manifests or {})
        self._is_closed = manifests is not None

    @cached_property
    def caption_command(self) -> str:
        """What makes captions, as it is typed."""
        return f"`{typed_command('caption', {'run': self.run})}`"

    def find(self, name: str, *, key: str) -> CaptionColumn:
        """Return where a column of captions lies.

        Args:
            name: `caption`, another column of texts of `captions/`, or a pass.
            key: of the recipe, which names it.

        Raises:
            UserError: there is no such column; names those there are.
            MissingFileError: its captions are not made yet, or not to their end; names the command.
        """
        found = self._found(name)
        if found is None:
            raise MissingFileError(
                f"{key}: {self._place(name)[0]} has no manifest: its captions are not there yet, or not all; type "
                f"{self.caption_command} first"
            )
        if found.manifest.shards:
            self._require_texts(found, key=key)
        return found

    def folders(self, columns: Sequence[str]) -> list[CaptionColumn]:
        """Return one column of each folder that some columns lie in, of those that are there."""
        found = [column for name in columns if (column := self._found(name)) is not None]
        return list({column.folder: column for column in found}.values())

    def texts_digest(self, columns: Sequence[str]) -> str | None:
        """Return what text features of some columns know their captions by; None where some are not there."""
        found = [self._found(name) for name in columns]
        there = [column for column in found if column is not None]
        if len(there) < len(found):
            return None
        main = captions_folder(self.run)
        if all(column.folder == main for column in there):
            return texts_digest(there[0].manifest, columns)
        return Fingerprint.of({each.name: texts_digest(each.manifest, [each.column]) for each in there}).digest

    def _found(self, name: str) -> CaptionColumn | None:
        folder, column = self._place(name)
        if folder not in self._manifests:
            if self._is_closed or not manifest_path(folder).is_file():
                return None
            self._manifests[folder] = read_manifest(folder)
        return CaptionColumn(name=name, folder=folder, manifest=self._manifests[folder], column=column)

    def _place(self, name: str) -> tuple[Path, str]:
        own = captions_folder(self.run, name)
        return (own, MAIN_CAPTION) if own.is_dir() else (captions_folder(self.run), name)

    def require_shards(self, column: CaptionColumn, raw: Sequence[Source]) -> None:
        """Check that a column has the captions of raw shards as they are, and of what it was cut of as that is.

        Raises:
            UserError: some shard has no captions, they were made from another file, or cut of others, or by other
                claims, than there are; names it and the command.
        """
        shards = column.manifest.shards
        if missing := [source.name for source in raw if source.name not in shards]:
            some = ", ".join(missing[:MAX_NAMED]) + (" …" if len(missing) > MAX_NAMED else "")
            raise UserError(
                f"{column.folder}: {len(missing):,} of {len(raw):,} shards have no captions ({some}); type "
                f"{self.caption_command} with {typed_flag('shards')} of all first{_of_its_own(column)}"
            )
        for source in raw:
            require_same(
                "source",
                source.identity,
                raw_identity(shards[source.name].source),
                where=str(column.file(source.name)),
                mend=f"{source.path} has changed since: put back the one that was captioned, or type "
                f"{self.caption_command} again: this shard alone is captioned anew",
            )
        if column.cut_of is not None:
            self._require_cut(column, column.cut_of, raw)

    def _require_cut(self, column: CaptionColumn, of: str, raw: Sequence[Source]) -> None:
        """Check that a column was cut of the captions, and by the claims, that are there now."""
        parent = self.find(of, key=f"{column.folder}, which was cut of {of!r}")
        self.require_shards(parent, raw)
        claims = claims_folder(self.run, of)
        is_there = not self._is_closed and manifest_path(claims).is_file()
        marked = read_manifest(claims).shards if is_there else {}
        for source in raw:
            made_of = column.manifest.shards[source.name].source
            others = None
            if not made_of.endswith(f"{CAPTIONS_SEAM}{parent.sha256(source.name)}"):
                others = f"of other captions than are in {parent.folder}"
            elif CLAIMS_SEAM in made_of and source.name in marked:
                seam = f"{CLAIMS_SEAM}{marked[source.name].files['.parquet']}{CAPTIONS_SEAM}"
                others = None if seam in made_of else f"by other claims than are in {claims}"
            if others is not None:
                raise UserError(
                    f"{column.file(source.name)} was cut {others} now: type {self.caption_command} again, which cuts "
                    "them anew"
                )

    def _require_texts(self, found: CaptionColumn, *, key: str) -> None:
        first = found.file(min(found.manifest.shards))
        schema = read_table_schema(first, mend=mend_captions())
        texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name not in NO_TEXTS]
        if found.column not in texts:
            passes = [folder.name.partition("@")[2] for folder in sorted(self.run.glob(f"{CAPTIONS}@*"))]
            known = [*texts, *passes]
            raise UserError(
                f"{key} names {found.name!r}, but {self.run} has no such captions{did_you_mean(found.name, known)}; "
                f"those there are: {', '.join(known)}. {self.caption_command} makes a pass of [captioning.passes]"
            )
