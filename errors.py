"""What a user can mend, and how it is said: the one module that every room may import."""

import errno
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
UNSOUND = (errno.EIO, errno.ESTALE)
# How a file begins that stands for another one.
POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")
# A file where a folder is needed, and the like: only what stands on the disk can bring them about.
MISPLACED = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
# How libraries say that memory is short where they raise no error of its own kind.
MEMORY_SIGNS = (
    "DefaultCPUAllocator: ",
    "std::bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
    "Cannot allocate memory",
)
MAX_REASON_CHARACTERS = 160
DISTRIBUTION = "pixart-atelier"
# The extra that brings a room's packages, where it is not called as the room is.
EXTRA_OF_ROOM = {"dataset_stats": "stats"}
# Modules that are not called as the package that brings them.
PACKAGE_OF_MODULE = {"PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless"}


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


class MemoryShortageError(UserError):
    """The memory of the machine or of its GPU does not suffice; says for what, and what to lower."""


class TooManyRejectsError(UserError):
    """More samples could not be used than the recipe allows; names the largest reasons."""


class LoneItemError(MemoryError):
    """A single item does not fit the memory: smaller batches are of no use."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's memory or a GPU's was too small.

    Errors of torch and Ray are known by their names and words: nothing loads either for this question.
    """
    if isinstance(error, UserError | ProgramFault):
        return False
    if isinstance(error, MemoryError):  # of numpy and pyarrow, too
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)


def describe_memory_shortage(error: BaseException, *, what: str, settings: Mapping[str, Any]) -> str:
    """Return one line: what did not fit, how much was asked for, and which of `settings` to lower.

    Args:
        error: one of `is_out_of_memory`.
        what: the shard, image or step that did not fit.
        settings: keys of the recipe with the values to lower; numbers of 1 and less cannot be lowered.
    """
    reason = describe_reason(error)
    if isinstance(error, LoneItemError):
        settings = {key: value for key, value in settings.items() if "batch" not in key}
    advice = describe_lowering(settings)
    return f"{what}: out of memory{f' ({reason})' if reason else ''}; {advice}; what is done is kept"


def describe_lowering(settings: Mapping[str, Any]) -> str:
    """Return what to do where the memory is too small: which of `settings` to lower, those of 1 and less left out."""
    lower = [
        f"{key} = {value}" for key, value in settings.items() if not (isinstance(value, int | float) and value <= 1)
    ]
    return f"lower {' or '.join(lower)}" if lower else "close other programs, or take a machine with more memory"


def describe_reason(error: BaseException) -> str:
    """Return what a library says of the memory that it lacks, cut to some words; often nothing."""
    reason = (str(error).splitlines() or [""])[0].rpartition("DefaultCPUAllocator: ")[2].strip().rstrip(".")
    return reason if len(reason) <= MAX_REASON_CHARACTERS else f"{reason[:MAX_REASON_CHARACTERS]} …"


@contextmanager
def memory_for(what: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Say in one line that what is done inside does not fit the memory.

    Raises:
        MemoryShortageError: it does not; names `what`, and `settings` to lower as `describe_memory_shortage` does.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortageError(describe_memory_shortage(error, what=what, settings=settings)) from error


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


def users_message(error: BaseException, place: object = None) -> str | None:
    """Return what to tell a user who can mend it, or None if the error is a fault of the program.

    `place` as in `describe_storage_error`.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return describe_missing_package(error)
    if is_out_of_memory(error):
        return describe_memory_shortage(error, what="this command", settings={})
    return describe_storage_error(error, place) if isinstance(error, OSError) else None


def describe_missing_package(error: ModuleNotFoundError) -> str | None:
    """Return which package is to be installed, and how; None if it is none that this program is said to need."""
    module = (error.name or "").partition(".")[0]
    package = PACKAGE_OF_MODULE.get(module, module).replace("_", "-").lower()
    requirements, is_clone = _requirements()
    found = {extra: names for extra, names in requirements.items() if package in names}
    if not found:
        return None
    frames = [frame.f_globals.get("__spec__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [spec.name.partition(".")[0] for spec in frames if spec is not None]
    extra = next((extra for room in rooms if (extra := EXTRA_OF_ROOM.get(room, room)) in found), next(iter(found)))
    said = f"the package {package} is not installed, which {f'{extra} needs' if extra else 'everything here needs'}"
    if is_clone:
        return f"{said}: `make` brings up an environment that has it, `pip install -r requirements.lock` installs it"
    return f"{said}: pip install '{DISTRIBUTION}[{extra}]'" if extra else f"{said}: pip install {DISTRIBUTION}"


def _requirements() -> tuple[dict[str, list[str]], bool]:
    """Return the packages that each extra needs, '' for all, and whether that is a clone's word, not a package's."""
    import importlib.metadata
    import tomllib

    project = Path(__file__).parent / "pyproject.toml"
    if project.is_file():
        tables = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = {"": tables["dependencies"]} | tables["optional-dependencies"]
        return {extra: [_package(text) for text in texts] for extra, texts in groups.items()}, True
    texts: list[str] = []
    found: dict[str, list[str]] = {}
    with suppress(importlib.metadata.PackageNotFoundError):
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    for text in texts:
        extra = re.search(r"""extra *== *["']([\w-]+)""", text)
        found.setdefault(extra[1] if extra else "", []).append(_package(text))
    return found, False


def _package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("_", "-").lower()


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
