"""The captions that are asked about: where a column of them lies, which shards have it, and what each row says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from errors import MissingFileError, UserError
from pipelines.as_typed import did_you_mean, typed_command, typed_flag
from pipelines.engine.pieces import Source
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Manifest, manifest_path, read_manifest, require_same
from pipelines.store.tables import read_table, read_table_schema

MAIN_COLUMN = "caption"
CAPTIONS = "captions"
# Columns of captions that say what a row is of, and what became of it.
NO_TEXTS = ("key", "shard", "prompt", "finish_reason", "reject")
MAX_NAMED = 3
# Between the identity of a raw shard and the hash of its captions; neither holds one.
SEAM = "+captions:"


@dataclass(frozen=True, kw_only=True)
class CaptionColumn:
    """A column of captions: what it is called in recipes, the folder it lies in, its manifest, and its name there."""

    name: str
    folder: Path
    manifest: Manifest
    column: str

    @property
    def score(self) -> str:
        """The folder of its claims below `columns/`: `claims` of the captions themselves, `claims@<name>` of others."""
        return "claims" if self.name == MAIN_COLUMN else f"claims@{self.name}"


def find_column(run: Path, name: str) -> CaptionColumn:
    """Return where a column of captions lies: in a folder of its own, `captions@<name>`, or beside the captions.

    Raises:
        UserError: there is no such column; names those there are.
        MissingFileError: its captions are not made yet, or not to their end; names the command.
    """
    own = run / f"{CAPTIONS}@{name}"
    folder, column = (own, MAIN_COLUMN) if name != MAIN_COLUMN and own.is_dir() else (run / CAPTIONS, name)
    if not manifest_path(folder).is_file():
        raise MissingFileError(
            f"{folder} has no manifest: its captions are not there yet, or not all; type "
            f"`{typed_command('caption', {'run': run})}` first"
        )
    manifest = read_manifest(folder)
    found = CaptionColumn(name=name, folder=folder, manifest=manifest, column=column)
    if manifest.shards:
        _require_texts(found, folder / f"{min(manifest.shards)}.parquet", run)
    return found


def _require_texts(found: CaptionColumn, path: Path, run: Path) -> None:
    schema = read_table_schema(path, mend=_mend())
    texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name not in NO_TEXTS]
    if found.column not in texts:
        passes = [folder.name.removeprefix(f"{CAPTIONS}@") for folder in sorted(run.glob(f"{CAPTIONS}@*"))]
        known = [*texts, *passes]
        raise UserError(
            f"captioning.claims.of names {found.name!r}, but {run} has no such captions"
            f"{did_you_mean(found.name, known)}; those there are: {', '.join(known)}"
        )


def claim_sources(run: Path, raw: Sequence[Source], column: CaptionColumn) -> list[Source]:
    """Return the raw shards as sources whose identity changes with their captions, too.

    Raises:
        UserError: some shard has no captions, or they were made from another file; names it and the command.
    """
    shards = column.manifest.shards
    if missing := [source.name for source in raw if source.name not in shards]:
        some = ", ".join(missing[:MAX_NAMED]) + (" …" if len(missing) > MAX_NAMED else "")
        command = typed_command("caption", {"run": run})
        raise UserError(
            f"{column.folder}: {len(missing):,} of {len(raw):,} shards have no captions ({some}); type `{command}` "
            f"with {typed_flag('shards')} of all first, or name fewer in captioning.shards"
        )
    # What was cut of other captions is known by those; whose samples they are, each worker sees by their keys.
    for source in raw if "of" not in column.manifest.extra else ():
        require_same(
            "source",
            source.identity,
            shards[source.name].source,
            where=str(column.folder / f"{source.name}.parquet"),
            mend=f"type `{typed_command('caption', {'run': run})}` again: shards that have changed are captioned anew",
        )
    return [
        Source(
            name=source.name,
            path=source.path,
            identity=f"{source.identity}{SEAM}{shards[source.name].files['.parquet']}",
            num_samples=source.num_samples,
        )
        for source in raw
    ]


def split_identity(identity: str) -> tuple[str, str]:
    """Return the identity of the raw shard and the SHA-256 of its captions, of one of `claim_sources`."""
    raw, _, captions = identity.rpartition(SEAM)
    return raw, captions


@dataclass(frozen=True, kw_only=True)
class CaptionTexts:
    """A shard's captions: keys, texts and rejects, one each per sample, in raw order."""

    path: Path
    keys: list[str]
    texts: list[str | None]
    rejects: list[str | None]

    @property
    def columns(self) -> tuple[list[str], list[str | None], list[str | None]]:
        """All of it, for a hash."""
        return self.keys, self.texts, self.rejects

    def by_key(self, raw: RawShard) -> dict[str, tuple[str | None, str | None]]:
        """Return text and reject of each sample that is sound as it lies in the raw shard.

        Raises:
            UserError: the captions are of other samples.
        """
        if self.keys != [sample.key for sample in raw.samples]:
            raise UserError(f"{self.path} has other samples than {raw.name}; {_mend()}")
        rows = zip(raw.samples, self.texts, self.rejects, strict=True)
        return {sample.key: (text, reject) for sample, text, reject in rows if sample.reject is None}


def read_texts(path: Path, column: str, *, sha256: str) -> CaptionTexts:
    """Read a column of a captions file that has this hash.

    Raises:
        UserError: the file is not there or damaged, has changed, or lacks the column.
    """
    table = read_table(path, ["key", column, "reject"], mend=_mend())
    if (found := sha256_file(path)) != sha256:
        raise UserError(f"{path} has SHA-256 {found}, but by its manifest {sha256}: it has changed; {_mend()}")
    keys, texts, rejects = (table.column(name).to_pylist() for name in ("key", column, "reject"))
    return CaptionTexts(path=path, keys=keys, texts=texts, rejects=rejects)


def text_of(sample: RawSample, texts: dict[str, tuple[str | None, str | None]]) -> tuple[str | None, str | None]:
    """Return text and reject of a sample."""
    return texts[sample.key] if sample.reject is None else (None, sample.reject)


def _mend() -> str:
    return f"remove it and type `{typed_command('caption')}` again: this shard alone is captioned anew"
