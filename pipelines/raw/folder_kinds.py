"""Which raw shards a folder has: tars, Parquet or Arrow files of a data set, or itself, if it has images."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.folder_shards import METADATA_NAMES
from pipelines.raw.image_columns import image_column
from pipelines.raw.reading import AS_IT_COMES
from pipelines.raw.shard_names import is_image_name
from pipelines.raw.tables import table_format
from pipelines.store.tables import MEND_USERS, sound_table

MAX_DEPTH = 8
FILES_NAMED = 3
ROW_SUFFIXES = (".parquet", ".pq", ".arrow")
# What `datasets` keeps beside its own files.
CACHE_PREFIXES = ("cache-", "tmp")

log = get_logger("shards")


def shards_in(folder: str) -> list[str]:
    """Return the raw shards of a local folder, looking deeper as long as there is nothing.

    Its tars; else the Parquet and Arrow files with images, here or in folders of splits; else, if there are images,
    the folder itself.

    Raises:
        MissingFileError: there is nothing of them; says what there is.
        UserError: there are only folders of tars, of which it is not guessed which are meant.
    """
    folders, tables = [folder], []
    for depth in range(MAX_DEPTH):
        level = _Level(folders)
        if depth == 0 and level.tars:
            _warn_of_images(folder, len(level.tars))
            return level.tars
        if level.tars:
            example = "/".join([folder.rstrip("/"), *["*"] * depth, "*.tar"])
            raise UserError(
                f"data.shards: {folder} has no tar of its own, but {level.tars[0]} and others below: type '{example}'"
            )
        if level.rows and not (level.has_images and not _has_image_column(level.rows[0])):
            return level.rows
        if level.has_images:
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
            name = entry.name.lower()
            if entry.name.startswith("."):
                continue
            if is_image_name(entry.name):
                self.has_images = True
            elif name.endswith(".tar"):
                self.tars.append(entry.path)
            elif name.endswith(ROW_SUFFIXES) and name not in METADATA_NAMES and not name.startswith(CACHE_PREFIXES):
                self.rows.append(entry.path)
            elif table_format(entry.name) not in (None, "lines") and name not in METADATA_NAMES:
                self.tables.append(entry.path)
            elif entry.is_dir():
                self.folders.append(entry.path)


def _has_image_column(path: str) -> bool:
    if not path.lower().endswith((".parquet", ".pq")):
        return True
    with sound_table(path, mend=MEND_USERS):
        return image_column(pq.read_schema(path), AS_IT_COMES, where=path) is not None


def _warn_of_images(folder: str, num_tars: int) -> None:
    """Say how many images lie beside tars, which alone are read."""
    num_images = sum(is_image_name(name) for _, _, names in os.walk(folder) for name in names)
    if num_images:
        log.warning(
            f"data.shards: {folder} has {num_tars:,} tars, which are read, and {num_images:,} images beside them, "
            "which are not; name their own folder, or move them into one"
        )


def refuse_images(paths: Sequence[str]) -> None:
    """Refuse image files as shards; raises `UserError`, which names their folder."""
    images = [path for path in paths if is_image_name(Path(path.partition("?")[0]).name)]
    if images:
        folder = Path(images[0]).parent
        raise UserError(
            f"data.shards: {images[0]} is an image, and no shard: name the folder, SHARDS={folder}/, which is one"
        )
