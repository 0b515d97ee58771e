"""What a user can mend, and how it is said: the one module that every room may import."""

import errno
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
UNSOUND = (errno.EIO, errno.ESTALE)
# How a file begins that stands for another one.
POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")
# A file where a folder is needed, and the like: only what stands on the disk can bring them about.
MISPLACED = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(Exception):
    """What a user can mend: a command ends with its message alone and status 2.

    Every other exception is a fault of the program and keeps its traceback. It is no `ValueError`: what catches those
    of a library must not take a lost connection for bad data.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file that a user has named, or that an earlier command makes, is not there."""


class ProgramFault(Exception):
    """A fault of the program in another process, whose traceback is in the message or has been printed there."""


class StorageError(UserError, OSError):
    """A disk or a server did not do what it should: full, out of reach, or its content has changed."""


def describe_storage_error(error: OSError, place: object = None) -> str | None:
    """Return what to do about a full, read-only or failing disk, or a file in the way; None if the error is another.

    `place` names what was being written, where the error does not.
    """
    where = error.filename if error.filename is not None else place
    named = "" if where is None else f"{where}: "
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return f"{named}the disk is full ({reason}); make room and type the command again, what is done is kept"
    if error.errno == errno.EROFS:
        return f"{named}the disk is read-only ({reason}); mount it for writing and type the command again"
    if error.errno in REFUSED:
        return f"{named}you may not read or write this ({reason}); change its rights or owner, or name another place"
    if error.errno in TOO_MANY_FILES:
        return f"{named}too many files are open ({reason}); raise the limit with `ulimit -n`"
    if error.errno in UNSOUND:
        return f"{named}the storage does not answer ({reason}); mend or mount it and type the command again"
    if error.errno in MISPLACED or (isinstance(where, str) and _is_in_the_way(error, where)):
        return f"{named}this is not what is needed there ({reason}); move it away, or name another place"
    return None


def describe_unfetched(head: bytes) -> str | None:
    """Return what a file is, and what to do about it, if its first bytes say that it was never fetched as itself."""
    if not head:
        return "is empty: it was not written or fetched to its end"
    if head.startswith(POINTER):
        return "is a pointer of git-lfs, not the file itself: run `git lfs pull` where it was cloned"
    if head.lstrip().lower().startswith(PAGES):
        return "is a web page that was saved under this name: fetch the file itself"
    return None


def _is_in_the_way(error: OSError, where: str) -> bool:
    """Whether a folder was to be made where there is a file, or a link that leads nowhere."""
    return error.errno == errno.EEXIST and not Path(where).is_dir()
