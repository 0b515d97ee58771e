"""Reading through fsspec, and writing so that a killed process never leaves a file that looks whole."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

HASH_CHUNK_BYTES = 1 << 20


def is_remote(url: str) -> bool:
    """Whether `url` names an fsspec protocol such as `s3://` rather than a local path."""
    return "://" in url and not url.startswith("file://")


@contextlib.contextmanager
def open_binary(url: str) -> Iterator[BinaryIO]:
    """Open a local path or fsspec URL for seekable reading.

    Raises:
        FileNotFoundError: names the URL that does not exist.
    """
    if not is_remote(url):
        with Path(url.removeprefix("file://")).open("rb") as file:
            yield file
        return
    with fsspec.open(url, "rb") as file:
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; on success it is fsynced and renamed to `path`.

    After an exception the temporary file is removed and `path` is as it was. The temporary name is random, so that
    two processes writing the same file cannot mix their bytes: in containers of two nodes even process ids agree.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def remove_temporary_files(directory: Path) -> None:
    """Remove what `atomic_file` left in `directory` when its process was killed; the caller holds the directory."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make the renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory for writing; the lock goes with the process, however it ends.

    On NFS the lock holds between nodes too; one of a node that has lost power ends with the server's lease.

    Raises:
        ValueError: another process is writing the directory, or its storage has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is being written by another process; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise ValueError(
                f"{directory}: this storage has no file locks ({error.strerror}), so two commands could write it at "
                "once; mount it with locks (Lustre: -o flock; NFS: without nolock)"
            ) from None
        yield


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see either the old bytes or all of the new."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically: equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Return the hex SHA-256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()
