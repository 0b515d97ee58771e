"""A table that names image files as a raw shard: each row a sample, with its texts in other columns."""

import hashlib
from pathlib import Path

from pipelines.raw.kinds.folder_shards import MISSING_IMAGE_FILE
from pipelines.raw.kinds.local_files import MISSING, FileFacts, LocalFiles, identify_files, local_name, look_at_files
from pipelines.raw.reading import Reading, UnreadableShardError
from pipelines.raw.samples import Member, RawSample
from pipelines.raw.shard_headers import ShardHeaders, ShardSummary
from pipelines.raw.shard_names import shard_name
from pipelines.raw.tables.image_columns import path_column
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.row_texts import RowTexts, row_keys
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
    samples = []
    for row, (key, reject, facts) in enumerate(zip(keys, rejects, files, strict=True)):
        extension = facts.name.rpartition(".")[2].lower() or "image"
        reason = reject or (MISSING_IMAGE_FILE if facts.size == MISSING else None)
        members = {} if facts.size == MISSING else {extension: Member(row, facts.size)}
        samples.append(RawSample(key, members, extension if members else None, reject=reason, row=row))
    content = sha256_text(f"{_content_digest(file)} {identify_files(folder, files)} {column}")
    summary = ShardSummary(
        kind="table",
        stamp=file.stamp,
        image_column=reading.image_column,
        identity=content,
        num_samples=len(samples),
        num_texts=len(samples) if texts.text_columns or reading.text_column in texts.columns else 0,
        has_labels=texts.has_labels(),
        unusable=[],
        strays=[],
        fault=None,
    )
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


def _content_digest(file: RangeFile) -> str:
    digest = hashlib.sha256()
    for start in range(0, file.size, CHUNK_BYTES):
        digest.update(file.read(start, CHUNK_BYTES))
    return digest.hexdigest()
