"""A bounded folder of local copies of remote files, shared by all processes that use it.

A file is kept under the SHA-256 its manifest gives it, and checked against it after download, so a copy is never stale
and never half. Least recently used files make room. What is locked is not removed: whoever opens a file holds a shared
`flock` on it until it is closed, and the lock goes with the process, however it ends. A download holds an exclusive
lock on its temporary file: others that want the same file wait for it instead of fetching it too, and take over if its
process dies. Locks work between the hosts that share a disk where the file system passes `flock` on, as NFSv4 does.

Who waits may hold other files open, so nobody waits in a lock for somebody who reads. A temporary file becomes the
copy, and its readers' locks are on the same file that others wait for: they ask for it again and again, and look in
between whether the copy is there. All other locks that are waited for are held for one short call that waits for none.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from errors import StorageError, UserError
from pipelines.store.files import RangeFile, discard, discard_folder, open_ranges, own_files

GIGABYTE = 1e9
CHUNK_BYTES = 8 << 20
PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"
# Between two looks at a file that another process downloads.
WAIT_SECONDS = 0.02
# A copy lies in a folder that is called after its SHA-256.
FOLDER_NAME = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(rf"[^.].*\.(tar|parquet)({re.escape(PARTIAL_SUFFIX)})?", re.DOTALL)


class CacheFullError(UserError):
    """No room for a file: everything else in the cache is in use."""


@dataclass(frozen=True)
class ShardFile:
    """A local file to read; a cached one stays in the cache until it is closed. Use as a context manager."""

    path: Path
    descriptor: int | None = None

    def close(self) -> None:
        """Allow the cache to remove the file."""
        if self.descriptor is not None:
            os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ShardCache:
    """Opens remote files through local copies.

    Args:
        directory: of the copies; made if missing.
        max_bytes: most bytes they may take together, unfinished downloads included.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    def open(self, url: str, sha256: str, *, is_stopping: threading.Event | None = None) -> ShardFile:
        """Return the local copy of `url`, downloaded if need be.

        Args:
            url: any fsspec URL; the copy has its file name.
            sha256: of its bytes.
            is_stopping: set by who no longer wants the file, which ends its download.

        Raises:
            CacheFullError: there is no room; names the recipe keys and sizes.
            StorageError: the file is not the one its manifest describes.
            MissingFileError, StorageError, UserError: see `pipelines.store.remote`; network faults are
                tried again.
        """
        path = self.directory / sha256 / url.rsplit("/", 1)[-1]
        is_stopping = is_stopping or threading.Event()
        while True:
            if (file := _lock_copy(path)) is not None:
                return file
            with _lock_download(path, is_stopping) as descriptor:
                if descriptor is not None and not path.exists():
                    self._download(url, sha256, path, descriptor, is_stopping)

    def _download(self, url: str, sha256: str, path: Path, descriptor: int, is_stopping: threading.Event) -> None:
        """Fill the locked temporary file, check it and give it its name; whatever fails, nothing of it stays."""
        try:
            with open_ranges(url) as remote:
                self._reserve(descriptor, remote.size, url)
                found = _copy(remote, descriptor, is_stopping)
            if found != sha256:
                raise StorageError(
                    f"{url} has SHA-256 {found}, but the manifest beside it says {sha256}; it was changed"
                )
            os.fsync(descriptor)
        except BaseException:
            _partial(path).unlink()
            raise
        _partial(path).rename(path)

    def _reserve(self, descriptor: int, size: int, url: str) -> None:
        """Give the temporary file its final size, so that every process counts it, once there is room for it."""
        with (self.directory / LOCK_NAME).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = sorted(self._entries())
            used = sum(num_bytes for _, num_bytes, _ in entries)
            for _, num_bytes, path in entries:
                if used + size <= self.max_bytes:
                    break
                if _remove_if_unused(path):
                    used -= num_bytes
            if used + size > self.max_bytes:
                raise CacheFullError(
                    f"training.cache_gigabytes = {self.max_bytes / GIGABYTE:g} has no room in {self.directory} for "
                    f"{url} ({size / GIGABYTE:.3g} GB): {used / GIGABYTE:.3g} GB are in use; raise it, or lower "
                    "training.shards_per_block"
                )
            os.ftruncate(descriptor, size)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield time of last use, size and path of every copy, unfinished ones too; what else lies here is not ours."""
        for folder in self.directory.iterdir():
            if FOLDER_NAME.fullmatch(folder.name) is None or folder.is_symlink():
                continue
            for path in own_files(folder, FILE_NAME):
                with contextlib.suppress(FileNotFoundError):  # another process may rename or remove it meanwhile
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path


def _copy(remote: RangeFile, descriptor: int, is_stopping: threading.Event) -> str:
    """Copy a remote file's bytes to a descriptor; returns their SHA-256."""
    digest, position = hashlib.sha256(), 0
    while position < remote.size:
        _require_reader(is_stopping)
        chunk = remote.read(position, CHUNK_BYTES)
        digest.update(chunk)
        position += os.pwrite(descriptor, chunk, position)
    return digest.hexdigest()


def _require_reader(is_stopping: threading.Event) -> None:
    if is_stopping.is_set():
        raise StorageError("the reader was left")


def remote_size(url: str) -> int:
    """Return the bytes of a remote file; raises as `open_ranges` does."""
    with open_ranges(url) as file:
        return file.size


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


def _lock_copy(path: Path) -> ShardFile | None:
    """Return a finished copy, locked against removal and marked as just used; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # removed between opening and locking
        os.close(descriptor)
        return None
    os.utime(path)
    return ShardFile(path, descriptor)


@contextlib.contextmanager
def _lock_download(path: Path, is_stopping: threading.Event) -> Iterator[int | None]:
    """Hold a copy's temporary file; yields its descriptor, or None if another process finished or removed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(_partial(path), os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # its folder was removed with another file, just now
        yield None
        return
    try:
        while _is_partial(path, descriptor) and not _is_locked(descriptor):
            _require_reader(is_stopping)
            time.sleep(WAIT_SECONDS)
        # It may have been renamed or removed before it was locked.
        yield descriptor if _is_partial(path, descriptor) else None
    finally:
        os.close(descriptor)


def _is_partial(path: Path, descriptor: int) -> bool:
    """Whether an open file is a copy's temporary one still, and has not become the copy or been removed."""
    try:
        found, status = _partial(path).stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return found.st_ino == status.st_ino and status.st_nlink > 0


def _is_locked(descriptor: int) -> bool:
    """Lock a file for this descriptor alone if no other has it; returns whether it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_unused(path: Path) -> bool:
    """Remove a file that no process has open, a download left by a killed process too; returns whether it did."""
    try:
        # NFS locks for one alone what is open for writing.
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        if not _is_locked(descriptor):
            return False
        discard(path)
        discard_folder(path.parent)  # unless another file of the same hash is there, or one is being fetched again
        return not path.exists()
    finally:
        os.close(descriptor)
