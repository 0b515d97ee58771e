"""Writing whole folders: to the disk in fact, and with a word where the disk is full."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from errors import StorageError
from pipelines.store.files import fsync_directory

# What is left when a write has failed for want of room.
SMALLEST_FREE_BYTES = 1 << 20
# How torch, safetensors and other processes say that.
SIGNS = ("os error 28", "os error 122", "PytorchStreamWriter", "unexpected pos", "No space left", "quota exceeded")


@contextlib.contextmanager
def saying_a_full_disk(directory: Path, what: str) -> Iterator[None]:
    """Inside, a write that fails because the disk is full raises StorageError, which says `what` was not done."""
    try:
        yield
    except Exception as error:
        if not _is_full(error, directory):
            raise
        raise StorageError(f"{directory}: the disk is full, {what}; make room and type the command again") from error


def _is_full(error: Exception, directory: Path) -> bool:
    """Whether a failed write is a full disk's or quota's; torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in SIGNS) or shutil.disk_usage(directory).free < SMALLEST_FREE_BYTES


def fsync_tree(folder: Path) -> None:
    """Bring all files and folders in `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_directory(path)
    fsync_directory(folder)
