"""The files of a folder, or those that a table names: found once, read by number, and known again by their content."""

import functools
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from errors import StorageError, UserError
from pipelines.raw.samples import Member, is_stray_folder, readable_name
from pipelines.raw.tasks import cut_into_tasks, map_tasks
from pipelines.raw.texts import MASKS_KEY, TEXT_EXTENSIONS

# As of a tar: the last bytes of every file are part of the identity. Texts are edited in place, so all of them is.
TAIL_BYTES = 512
CHUNK_BYTES = 4 << 20
WHOLE_EXTENSIONS = (*TEXT_EXTENSIONS, "json", "csv", "tsv", "jsonl", "cls")
FILES_PER_TASK = 512
MISSING = -1


class FileFacts(NamedTuple):
    """A file by its name relative to the folder; a size of `MISSING` says that there is none."""

    name: str
    size: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    """What is in a folder and below.

    Attributes:
        files: in the order of their names.
        unusable: links that lead nowhere or in a circle, pipes and the like.
        hidden: folders that are not looked into.
        stamp: changes when a file does, without a look at any content.
    """

    files: list[FileFacts]
    unusable: list[str]
    hidden: list[str]
    stamp: str


def list_folder(folder: str) -> FolderContents:
    """Find all files of a folder; links are followed, but in no circle.

    Raises:
        UserError: a folder cannot be read; names it.
    """
    contents = FolderContents(files=[], unusable=[], hidden=[], stamp="")
    digest = hashlib.sha256()
    for name, status in _walk(folder, "", (_place(Path(folder).stat()),), contents):
        contents.files.append(FileFacts(name, status.st_size, status.st_mtime_ns))
        facts = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        digest.update(facts.encode(errors="surrogateescape"))
    return FolderContents(
        files=contents.files, unusable=contents.unusable, hidden=contents.hidden, stamp=digest.hexdigest()
    )


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], contents: FolderContents
) -> Iterator[tuple[str, os.stat_result]]:
    try:
        with os.scandir(f"{folder}/{prefix}") as found:
            entries = {entry.name + "/" * entry.is_dir(): entry for entry in found}
    except OSError as error:
        raise UserError(f"{folder}/{prefix} cannot be read: {error.strerror}") from None
    # In the order of whole paths, where `a.jpg` is before `a/b.jpg`.
    for name, entry in sorted(entries.items()):
        try:
            status = entry.stat()
        except OSError:
            contents.unusable.append(readable_name(prefix + name))
            continue
        if stat.S_ISREG(status.st_mode):
            yield prefix + name, status
        elif not stat.S_ISDIR(status.st_mode) or _place(status) in above:
            contents.unusable.append(readable_name(prefix + name))
        elif is_stray_folder(entry.name):
            contents.hidden.append(readable_name(prefix + name))
        else:
            yield from _walk(folder, prefix + name, (*above, _place(status)), contents)


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def file_path(folder: str, name: str) -> str:
    """Return where a file is by its name relative to a folder, or absolute."""
    return name if name.startswith("/") else f"{folder}/{name}"


def look_at_files(folder: str, names: Sequence[str]) -> list[FileFacts]:
    """Return the facts of files by name; of those that are no files, that they are missing."""

    def look(some: Sequence[str]) -> list[FileFacts]:
        return [_facts(folder, name) for name in some]

    return [facts for found in map_tasks(look, cut_into_tasks(names, FILES_PER_TASK)) for facts in found]


def _facts(folder: str, name: str) -> FileFacts:
    try:
        status = Path(file_path(folder, name)).stat()
    except (OSError, ValueError):
        return FileFacts(name, MISSING, 0)
    return (
        FileFacts(name, status.st_size, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode)
        else (FileFacts(name, MISSING, 0))
    )


def identify_files(folder: str, files: Sequence[FileFacts], *, tables: Collection[str] = ()) -> str:
    """Return a digest over names, sizes and the last bytes of files, of texts all bytes: equal for copies elsewhere.

    Args:
        tables: names of those that are texts too, whatever they are called.

    Raises:
        UserError: one cannot be read, or changes while it is; names it.
    """
    digest = hashlib.sha256()
    for part in map_tasks(functools.partial(_digest, folder, tables), cut_into_tasks(files, FILES_PER_TASK)):
        digest.update(part)
    return digest.hexdigest()


def _digest(folder: str, tables: Collection[str], files: Sequence[FileFacts]) -> bytes:
    digest = hashlib.sha256()
    for facts in files:
        digest.update(f"{facts.name}\0{facts.size}\0".encode(errors="surrogateescape"))
        if facts.size == MISSING:
            continue
        is_whole = facts.name in tables or _is_text(facts.name)
        first = 0 if is_whole else max(0, facts.size - TAIL_BYTES)
        for start in range(first, facts.size, CHUNK_BYTES):
            digest.update(_read(folder, facts, start, min(CHUNK_BYTES, facts.size - start)))
    return digest.digest()


def _is_text(name: str) -> bool:
    stem, _, extension = name.rpartition(".")
    return extension.lower() in WHOLE_EXTENSIONS and not (extension == "json" and MASKS_KEY.fullmatch(stem))


class LocalFiles:
    """`Members` whose offset is the number of a file."""

    def __init__(self, folder: str, files: Sequence[FileFacts]) -> None:
        self._folder, self._files = folder, files

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """Return a file's bytes, or its first `num_bytes`.

        Raises:
            StorageError: it is gone, out of reach, or has changed since the shard was described; names it.
        """
        size = member.size if num_bytes is None else min(num_bytes, member.size)
        return _read(self._folder, self._files[member.offset], 0, size)


def _read(folder: str, facts: FileFacts, offset: int, size: int) -> bytes:
    path = file_path(folder, facts.name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StorageError(f"{path} is gone since its folder was looked at; run the command again") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != facts[1:]:
            raise StorageError(f"{path} has changed since its folder was looked at; run the command again")
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise StorageError(f"{path} ends at byte {offset + len(data):,}; it has changed while it was read")
    return data
