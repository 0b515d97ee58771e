"""A table that names image files as a raw shard: each row a sample, with its texts in other columns."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipelines.raw.kinds.folder_shards import MISSING_IMAGE_FILE
from pipelines.raw.kinds.local_files import (
    MISSING,
    FileFacts,
    LocalFiles,
    file_path,
    identify_files,
    look_at_files,
)
from pipelines.raw.reading import Reading, UnreadableShardError
from pipelines.raw.samples import Member, RawSample, readable_name
from pipelines.raw.shard_headers import ShardHeaders, summary_of_rows
from pipelines.raw.shard_names import shard_name
from pipelines.raw.tables.image_columns import IMAGE_COLUMN, path_column, where_captions_go
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.row_texts import RowTexts, row_keys
from pipelines.raw.tables.rows import local_name
from pipelines.raw.tasks import no_garbage
from pipelines.store.files import RangeFile, is_remote, sha256_text

CHUNK_BYTES = 4 << 20
MAX_PATH_CHARACTERS = 4096  # no system has longer ones


@no_garbage()
def read_table_headers(path: str, file: RangeFile, reading: Reading) -> ShardHeaders:
    """Look at the files that a table names, relative to its own folder or absolute, also as `file://` or with `~`.

    Raises:
        UnreadableShardError: the table is not here, or has addresses or texts in place of paths; names it.
        UserError: it cannot be read, or no column is known to name files.
    """
    if is_remote(path):
        raise UnreadableShardError(
            f"{path} names images by their paths: download it with them, or give Parquet or tars"
        )
    with open_table(path) as table:
        require_sound(table)
        column = path_column(table.columns, reading, where=path)
        keys, rejects = row_keys(table, shard_name(path), path_column=column)
    texts = RowTexts([path])
    cells = [cell.strip() if isinstance(cell, str) else "" for cell in texts.column(column)]
    names = [local_name(cell) for cell in cells]
    if address := next((name for name in names if "://" in name), None):
        raise UnreadableShardError(
            f"{path}: column {column!r} has addresses, such as {address}, and no paths: download the images first, as "
            "img2dataset does"
        )
    if any(len(name) > MAX_PATH_CHARACTERS for name in names):
        raise UnreadableShardError(
            f"{path}: column {column!r} is text, and too long for paths, as images in base64 are: write bytes in a "
            "binary column, or as files"
        )
    folder = folder_of(path)
    files = look_at_files(folder, names)
    _find_windows_paths(folder, files)
    if files and all(facts.size == MISSING for facts in files):
        raise UnreadableShardError(
            f"{path}: none of the {len(files):,} files that column {column!r} names is there: "
            f"{_missing(folder, files)}; paths are relative to the table, and {IMAGE_COLUMN} says which column has them"
            f"{where_captions_go(path, table.columns)}"
        )
    samples = []
    for row, (key, reject, facts) in enumerate(zip(keys, rejects, files, strict=True)):
        extension = facts.name.rpartition(".")[2].lower() or "image"
        reason = reject or (MISSING_IMAGE_FILE if facts.size == MISSING else None)
        members = {} if facts.size == MISSING else {extension: Member(row, facts.size)}
        samples.append(RawSample(key, members, extension if members else None, reject=reason, row=row))
    content = sha256_text(f"{_content_digest(file)} {identify_files(folder, files)} {column}")
    summary = summary_of_rows(samples, texts, kind="table", stamp=file.stamp, identity=content, reading=reading)
    if MISSING_IMAGE_FILE in summary.rejects:
        summary.rejects[MISSING_IMAGE_FILE] = (summary.rejects[MISSING_IMAGE_FILE][0], _missing(folder, files))
    return ShardHeaders(summary=summary, samples=samples, files=files)


def are_files_as_known(path: str, headers: ShardHeaders) -> bool:
    """Whether the files that a table names are as they were."""
    return look_at_files(folder_of(path), [facts.name for facts in headers.files]) == list(headers.files)


def table_members(path: str, headers: ShardHeaders) -> LocalFiles:
    """Return the files that a table names."""
    return LocalFiles(folder_of(path), headers.files)


def folder_of(path: str) -> str:
    """Return the folder from which a table names files."""
    return str(Path(path.removeprefix("file://")).absolute().parent)


def _find_windows_paths(folder: str, files: list[FileFacts]) -> None:
    """Look once more for files that are not there, and that have `\\` in their names, as Windows writes paths."""
    places = [place for place, facts in enumerate(files) if facts.size == MISSING and "\\" in facts.name]
    again = look_at_files(folder, [files[place].name.replace("\\", "/") for place in places])
    for place, facts in zip(places, again, strict=True):
        files[place] = facts


def _missing(folder: str, files: Sequence[FileFacts]) -> str:
    """Say of the first file that is not there what it is called, and where it was looked for."""
    name = next(facts.name for facts in files if facts.size == MISSING)
    return f"{name!r} was looked for at {readable_name(file_path(folder, name))}"


def _content_digest(file: RangeFile) -> str:
    digest = hashlib.sha256()
    for start in range(0, file.size, CHUNK_BYTES):
        digest.update(file.read(start, CHUNK_BYTES))
    return digest.hexdigest()
