"""Folders of a run with a file of columns per shard: `captions`, `captions@<pass>`, `columns/<score>[@<caption>]`."""

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipelines.as_typed import typed_command
from pipelines.columns.known_scores import score_command
from pipelines.store.manifest import Manifest, manifest_path, read_manifest
from pipelines.store.tables import MEND_SHARD, read_table_schema

CAPTIONS, COLUMNS = "captions", "columns"
MAIN_CAPTION = "caption"
FLAGS = "flags"
# What a manifest of captions says of flags; those of before said nothing, and had these.
FORMER_FLAGS = ("empty", "truncated", "loop", "boilerplate", "off_frame", "off_alt_text", "retried")
# Of each folder's files: which sample a row is of, and why it has no values.
NO_VALUES = ("key", "shard", "reject")
NAME = re.compile(r"(?P<name>[a-z][a-z0-9_]*)(@(?P<caption>[a-z][a-z0-9_]*))?")


@dataclass(frozen=True, kw_only=True)
class ColumnsFolder:
    """A finished folder with a file of columns per shard.

    Attributes:
        name: of it, below the run, such as `columns/clip_score@short`.
        caption: the caption column that it is about; `caption` where it is about the image or the main captions.
        score: its name; None of captions.
        schema: of its files.
        manifest: what its shards are.
        command: what makes it, as it is typed.
    """

    name: str
    path: Path
    caption: str
    score: str | None
    schema: pa.Schema
    manifest: Manifest
    command: str

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Its columns by name, flags as `flags.<flag>`, too."""
        found = {field.name: field.type for field in self.schema if field.name not in NO_VALUES}
        if self.score is None and FLAGS in found:
            flags = self.manifest.extra.get(FLAGS, FORMER_FLAGS)
            found |= {f"{FLAGS}.{flag}": pa.bool_() for flag in flags}
        return found

    def file(self, shard: str) -> Path:
        """Return where a shard's columns are."""
        return self.path / f"{shard}.parquet"


@dataclass(frozen=True, kw_only=True)
class FoundFolders:
    """The folders of columns of a run, and what goes on with those that have not finished, by their names."""

    finished: list[ColumnsFolder]
    unfinished: dict[str, str]


def find_folders(run: Path) -> FoundFolders:
    """Return the folders of columns of a run, captions first, each kind sorted by name.

    Raises:
        UserError: a manifest or the first file of one is damaged; names it.
    """
    finished: list[ColumnsFolder] = []
    unfinished: dict[str, str] = {}
    for path in (*sorted(run.glob(f"{CAPTIONS}*")), *sorted((run / COLUMNS).glob("*"))):
        is_score = path.parent.name == COLUMNS
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_dir() or not (is_score or match["name"] == CAPTIONS):
            continue
        score = match["name"] if is_score else None
        name = f"{COLUMNS}/{path.name}" if is_score else path.name
        command = (
            score_command(score, run, caption=match["caption"])
            if score
            else f"`{typed_command('caption', {'run': run})}`"
        )
        if not manifest_path(path).is_file():
            unfinished[name] = command
            continue
        manifest = read_manifest(path)
        if not manifest.shards:
            continue
        first = path / f"{next(iter(manifest.shards))}.parquet"
        finished.append(
            ColumnsFolder(
                name=name,
                path=path,
                caption=match["caption"] or MAIN_CAPTION,
                score=score,
                schema=read_table_schema(first, mend=MEND_SHARD),
                manifest=manifest,
                command=command,
            )
        )
    return FoundFolders(finished=finished, unfinished=unfinished)
