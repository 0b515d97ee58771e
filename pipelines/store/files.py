"""Reading files by ranges, local or remote, and writing so that a killed process never leaves a half-written file."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.remote import RemoteFile

HASH_CHUNK_BYTES = 1 << 20
# So much costs no more to read than a part of it.
SMALL_FILE_BYTES = 64 << 10
LOCK_NAME = ".lock"
# Nobody goes on with a temporary file after that time; far more than the clocks of hosts are apart.
ABANDONED_SECONDS = 24 * 3600
# Why a folder cannot get a name that is in use.
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
# What `atomic_file` calls its temporary files, and nobody else his.
TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)

log = get_logger("store")


class RangeFile(Protocol):
    """A file that is read by place, from any thread.

    Attributes:
        size: in bytes.
        stamp: changes when the content does, without a look at the content; None where that cannot be known.
    """

    size: int
    stamp: str | None

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        ...


class LocalFile:
    """A `RangeFile` on a mounted file system; the stamp follows size, modification and change of the inode.

    A small file is read once, as a whole, when the first of its bytes are asked for.
    """

    def __init__(self, path: str) -> None:
        self._descriptor, status = _open_by_place(path)
        self.size = status.st_size
        self.stamp: str | None = f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
        self._whole: bytes | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        if self.size > SMALL_FILE_BYTES:
            return self._read(offset, size)
        if self._whole is None:
            self._whole = self._read(0, self.size)
        return self._whole[offset : offset + size]

    def _read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _open_by_place(path: str) -> tuple[int, os.stat_result]:
    """Open a local file; raises `UserError` if it is a pipe or a device, which would be waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        os.close(descriptor)
        raise UserError(f"{path} is a stream; it is read by place, so it must be a file")
    return descriptor, status


def is_remote(url: str) -> bool:
    """Whether `url` names an fsspec protocol such as `s3://` rather than a local path."""
    return "://" in url and not url.startswith("file://")


@contextlib.contextmanager
def open_ranges(url: str) -> Iterator[RangeFile]:
    """Open a local path or fsspec URL for reading by ranges.

    Raises:
        MissingFileError: names the URL that does not exist.
        UserError, StorageError: see `RemoteFile`.
    """
    file = RemoteFile(url) if is_remote(url) else LocalFile(url.removeprefix("file://"))
    try:
        yield file
    finally:
        file.close()


@contextlib.contextmanager
def open_binary(url: str) -> Iterator[BinaryIO]:
    """Open a local path or fsspec URL as a seekable file; raises as `open_ranges` does."""
    if not is_remote(url):
        with os.fdopen(_open_by_place(url.removeprefix("file://"))[0], "rb") as file:
            yield file
        return
    with open_ranges(url) as ranges, io.BufferedReader(_RangeStream(ranges)) as file:
        yield cast(BinaryIO, file)


class _RangeStream(io.RawIOBase):
    """A `RangeFile` with a position, for readers of other formats."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; on success it is fsynced and renamed to `path`.

    After an exception the temporary file is removed and `path` is as it was. The temporary name is random, so that
    two processes writing the same file cannot mix their bytes: in containers of two nodes even process ids agree. It
    is not locked: on SMB nobody can write a locked file but through the descriptor that holds the lock.

    Raises:
        UserError: there is a folder of that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    # safetensors puts a file of its own in the place, which its owner alone may read, whatever the umask says.
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill; on success it is renamed to `path`, which must not be there yet.

    After an exception it is removed, and so is what killed processes have left of the same `path`: folders of exactly
    such a name in which nothing has been written for `ABANDONED_SECONDS`.

    Raises:
        UserError: there is something of that name by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = TEMPORARY_NAME.fullmatch(leftover.name)
        is_folder = leftover.is_dir() and not leftover.is_symlink()
        if is_folder and found is not None and found["name"] == path.name and _is_abandoned(leftover):
            shutil.rmtree(leftover, onerror=_warn_of_leftover)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            raise UserError(f"{path} is there by now ({error.strerror}): name another folder, or remove it") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, onerror=_warn_of_leftover)
    fsync_directory(path.parent)


def _warn_of_leftover(_: Any, path: str, failure: Any) -> None:
    log.warning(f"{path} is of no use any more, but could not be removed: {failure[1].strerror}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path`, in the place of an older one.

    Raises:
        UserError: there is a folder of that name.
    """
    try:
        temporary.replace(path)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a file is to be written; move it away") from None


def is_file_itself(path: Path) -> bool:
    """Whether there is a file of that name: no folder, no link to one, as the house makes none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def own_files(directory: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the files in `directory` whose whole names match, sorted: no folders, no links, nothing if it is gone."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in directory.iterdir() if name.fullmatch(path.name) and is_file_itself(path))
    return []


def discard(path: Path) -> None:
    """Remove a file of the house that nobody needs; where that fails, a warning names it, and work goes on."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning(f"{path} is of no use any more, but could not be removed: {error.strerror}")


def take_away(path: Path) -> None:
    """Remove a file of the house that must not stay; there may be none.

    Raises:
        UserError: there is a folder of that name.
    """
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):
        if not path.is_dir():  # macOS forbids to unlink a folder, Linux says that it is one
            raise
        raise UserError(f"{path} is a folder, where a file is to be written; move it away") from None


def discard_folder(path: Path) -> None:
    """Remove a folder of the house if nothing is left in it; what somebody else has put there keeps it."""
    with contextlib.suppress(OSError):
        path.rmdir()


def remove_temporary_files(directory: Path, name: str = "", *, is_held: bool = False) -> None:
    """Remove what `atomic_file` left in `directory` when its process was killed; what is being written stays.

    No lock tells the two apart: not all storage has one for a file that is being written. Without `is_held`, only what
    nobody has written to for `ABANDONED_SECONDS` goes.

    Args:
        directory: that is looked into, not what is below it.
        name: only what was to become the file of that name, as in a folder that is not the house's own.
        is_held: the caller holds the lock that all hold who write here, such as `exclusive`, and writes nothing yet.
    """
    for leftover in own_files(directory, TEMPORARY_NAME):
        found = TEMPORARY_NAME.fullmatch(leftover.name)
        if found is not None and name in ("", found["name"]) and (is_held or _is_abandoned(leftover)):
            discard(leftover)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody has written to a file, or to a folder and all in it, for `ABANDONED_SECONDS`."""
    try:
        written = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:  # somebody is at work there
        return False
    return time.time() - written > ABANDONED_SECONDS


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
        UserError: another process is writing the directory, or its storage has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory} is being written by another process; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise UserError(
                f"{directory}: this storage has no file locks ({error.strerror}), so two commands could write it at "
                "once; mount it with locks (Lustre: -o flock; NFS: without nolock)"
            ) from None
        yield


@contextlib.contextmanager
def one_at_a_time(directory: Path, name: str = "") -> Iterator[None]:
    """Hold a directory for the instant in which a small file is written, after what killed processes have left there.

    Others wait for that instant. `name` as in `remove_temporary_files`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_NAME).open("w") as lock:
        # Storage without locks has no instant of its own; what is left there goes a day later.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            remove_temporary_files(directory, name, is_held=True)
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
