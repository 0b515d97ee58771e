"""Which raw shards a folder has: tars, Parquet or Arrow files of a data set, or itself, if it has images."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_flag
from pipelines.engine.progress import get_logger
from pipelines.raw.kinds.folder_shards import METADATA_NAMES
from pipelines.raw.reading import AS_IT_COMES
from pipelines.raw.samples import is_stray_folder
from pipelines.raw.shard_names import is_image_name
from pipelines.raw.tables.image_columns import image_column
from pipelines.raw.tables.open_table import table_format
from pipelines.store.tables import MEND_USERS, sound_table

MAX_DEPTH = 8
FILES_NAMED = 3
ROW_SUFFIXES = (".parquet", ".pq", ".arrow")
# What `datasets` keeps beside its own files.
CACHE_PREFIXES = ("cache-", "tmp")
# What a folder may be read as.
TARS, ROWS, IMAGES = "tars", "Parquet or Arrow files", "images"

log = get_logger("shards")


def shards_in(folder: str) -> list[str]:
    """Return the raw shards of a local folder, looking deeper as long as there is nothing.

    Its tars; else the Parquet and Arrow files with images, here or in folders of splits; else, if there are images,
    the folder itself. What is there beside these is counted in a warning.

    Raises:
        MissingFileError: there is nothing of them; says what there is.
        UserError: there are only folders of tars, of which it is not guessed which are meant.
    """
    folders, tables = [folder], []
    for depth in range(MAX_DEPTH):
        level = _Level(folders)
        if depth == 0 and level.tars:
            _warn_of_rest(folder, TARS, level.tars)
            return level.tars
        if level.tars:
            example = "/".join([folder.rstrip("/"), *["*"] * depth, "*.tar"])
            raise UserError(
                f"data.shards: {folder} has no tar of its own, but {level.tars[0]} and others below: type '{example}'"
            )
        with_images = [path for path in level.rows if _has_image_column(path)]
        if rows := with_images or ([] if level.has_images else level.rows):
            if with_images:  # tables of paths name the images beside them
                _warn_of_rest(folder, ROWS, rows, others=[path for path in level.rows if path not in {*rows}])
            return rows
        if level.has_images:
            _warn_of_rest(folder, IMAGES, [])
            return [folder]
        tables += level.tables
        folders = level.folders
        if not folders:
            break
    there = f"; of tables it has {', '.join(tables[:FILES_NAMED])}: name one" if tables else ""
    raise MissingFileError(
        f"data.shards: no shard matches {folder}: it has no tars, no Parquet or Arrow files and no images{there}"
    )


class _Level:
    """What is in some folders, without what is below."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.tars: list[str] = []
        self.rows: list[str] = []
        self.tables: list[str] = []
        self.folders: list[str] = []
        self.has_images = False
        for folder in folders:
            self._look(folder)
            if self.has_images and not self.rows and not self.tars and len(folders) > 1:
                return  # a folder of images may have a thousand others in it

    def _look(self, folder: str) -> None:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.shards: {folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():  # also one that is called as a file is, as Spark's of Parquet
                self.folders.append(entry.path)
                continue
            kind = _kind(entry.name)
            if kind == IMAGES:
                self.has_images = True
            elif kind == TARS:
                self.tars.append(entry.path)
            elif kind == ROWS:
                self.rows.append(entry.path)
            elif table_format(entry.name) not in (None, "lines") and entry.name.lower() not in METADATA_NAMES:
                self.tables.append(entry.path)


def _kind(name: str) -> str | None:
    if is_image_name(name):
        return IMAGES
    lower = name.lower()
    if lower.endswith(".tar"):
        return TARS
    is_rows = lower.endswith(ROW_SUFFIXES) and lower not in METADATA_NAMES and not lower.startswith(CACHE_PREFIXES)
    return ROWS if is_rows else None


def _has_image_column(path: str) -> bool:
    """Whether a file may have images in a column: one that is damaged, or has several such columns, says so later."""
    if not path.lower().endswith((".parquet", ".pq")):
        return True
    try:
        with sound_table(path, mend=MEND_USERS):
            return image_column(pq.read_schema(path), AS_IT_COMES, where=path) is not None
    except UserError:
        return True


def _warn_of_rest(folder: str, kind: str, shards: Sequence[str], *, others: Sequence[str] = ()) -> None:
    """Say what a folder has beside what is read of it.

    Args:
        kind: what is read: `shards`, or all images.
        others: files of rows beside the shards that have no images.
    """
    known, num_images = {*shards, *others}, 0
    left: dict[str, list[str]] = {IMAGES: [], TARS: [], ROWS: list(others)}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_stray_folder(name))
        for name in sorted(names):
            found = _kind(name)
            if found is None or name.startswith("."):
                continue
            if found == kind == IMAGES:
                num_images += 1
                continue
            path = f"{place.rstrip('/')}/{name}"
            if path in known:
                continue
            if found != ROWS or _has_image_column(path):
                left[found].append(path)
    if not any(left.values()):
        return
    listed = [
        f"{len(paths):,} {what} ({os.path.relpath(paths[0], folder)}{', ...' if len(paths) > 1 else ''})"
        for what, paths in left.items()
        if paths
    ]
    log.warning(
        f"data.shards: {folder} has {num_images or len(shards):,} {kind}, which are read, and beside them "
        f"{' and '.join(listed)}, which are not; name them, or their own folder, too"
    )


def refuse_images(paths: Sequence[str]) -> None:
    """Refuse image files as shards; raises `UserError`, which names their folder."""
    images = [path for path in paths if is_image_name(Path(path.partition("?")[0]).name)]
    if images:
        folder = Path(images[0]).parent
        raise UserError(
            f"data.shards: {images[0]} is an image, and no shard: name the folder, which is one, "
            f"{typed_flag('shards', f'{folder}/')}"
        )
