"""Object stores and web servers: ranges, few requests, bounded retries, errors that name the URL.

All go through fsspec, but for what S3's objects are read by, see `pipelines.store.object_store`.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar, cast

import fsspec
from fsspec.config import conf, set_conf_env

from errors import MissingFileError, StorageError, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.object_store import first_line, open_object

READ_ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
# A read that is far from the last ones asks for little; reads that follow each other ask for twice as much each time.
MIN_WINDOW_BYTES = 16 << 10
MAX_WINDOW_BYTES = 4 << 20
# Passing over this much costs about as long as one more request.
MAX_GAP_BYTES = 256 << 10
KEPT_WINDOWS = 4
# Where many files are read at once, their windows stay smaller: all of them together keep four times this.
ALL_WINDOWS_BYTES = 128 << 20
# What tells one version of a file from the next, the best first; names as the file systems of fsspec have them.
VERSION_FIELDS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "Last-Modified", "LastModified", "updated", "mtime")
# obstore's words for what waiting does not mend.
REFUSALS = ("PermissionDenied", "Unauthenticated")
# What other processes of a job need to read what this one can read.
ENVIRONMENT_PREFIXES = (
    "AWS_",
    "FSSPEC_",
    "GOOGLE_",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)

Result = TypeVar("Result")
log = get_logger("storage")
OPEN_FILES: "weakref.WeakSet[RemoteFile]" = weakref.WeakSet()


def storage_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that say where remote storage is and who may read it, for worker processes elsewhere."""
    return {name: value for name, value in environment.items() if name.upper().startswith(ENVIRONMENT_PREFIXES)}


def adopt_storage_environment(variables: Mapping[str, str]) -> None:
    """Take over what `storage_environment` gave in the process that asked for the work."""
    os.environ.update(variables)
    set_conf_env(conf, dict(variables))


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL, and the path within it.

    Raises:
        UserError: the protocol is unknown or needs a package that is not installed; names both.
    """
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {protocol}:// needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def list_urls(pattern: str) -> list[str]:
    """Return the URLs that fit a glob, or the tars in a folder whose URL ends with `/`.

    Raises:
        UserError, StorageError: see `open_file_system` and `retry`.
    """
    file_system, path = open_file_system(pattern if "*" in pattern or "[" in pattern else pattern + "*.tar")
    file_system.invalidate_cache()
    found = cast(list[str], retry(pattern, lambda: file_system.glob(path)))
    file_system.invalidate_cache()  # else it would know versions of files by that list for good
    return [str(file_system.unstrip_protocol(name)) for name in found]


def retry(url: str, call: Callable[[], Result]) -> Result:
    """Return `call()`, tried again a bounded number of times when the network, not the caller, is at fault.

    Raises:
        StorageError: it failed every time, or at once for a reason that waiting does not mend; names the URL.
    """
    wait_seconds = FIRST_WAIT_SECONDS
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return call()
        except (TypeError, AttributeError, LookupError, AssertionError):
            raise  # faults of the code
        except Exception as error:
            kind, reason = _explain(error)
            if kind is not None:
                raise kind(f"{url}: {reason}") from error
            if attempt == READ_ATTEMPTS:
                raise StorageError(f"{url}: gave up after {attempt} attempts: {reason}") from error
            log.warning(f"{url}: {reason}; attempt {attempt} of {READ_ATTEMPTS}, again in {wait_seconds:g} s")
        time.sleep(wait_seconds)
        wait_seconds *= 2
    raise AssertionError("the last attempt returns or raises")


def _explain(error: Exception) -> tuple[type[UserError] | None, str]:
    """Return the kind of a failure, None for one that may pass, and what to tell about it."""
    cause: BaseException = error
    if isinstance(error, FileNotFoundError) and type(error.__cause__).__module__.startswith(("aiohttp", "asyncio")):
        # fsspec's web file system calls everything "not found", a server that is down, too: its cause knows better.
        cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {first_line(cause)}" if str(cause) else type(cause).__name__
    status = getattr(cause, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return (MissingFileError, "does not exist") if status in (404, 410) else (StorageError, reason)
    if cause is error and isinstance(error, FileNotFoundError):
        return MissingFileError, "does not exist"
    kind = type(cause).__name__
    if isinstance(error, PermissionError) or kind.startswith(REFUSALS) or "Credentials" in kind:
        return StorageError, reason
    return None, reason


class RemoteFile:
    """A file behind a URL, read by ranges from any thread.

    Small reads are served from windows that grow while reads follow each other, so that a tar of small members is
    streamed in few requests; reads that are far from each other, and large members, are asked for in parallel, and
    what lies between is not read.

    Attributes:
        size: in bytes.
        stamp: changes when the content does; None where the server does not tell versions apart.

    Raises:
        MissingFileError, StorageError: it is not there, or out of reach; names the URL.
        UserError: see `open_file_system`; or the server cannot send ranges, or does not know the file's size.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        file_system, path = open_file_system(url)
        source = retry(url, lambda: open_object(file_system, path)) or _FsspecFile(url, file_system, path)
        self._source = source
        self.size = source.size
        self.stamp = None if source.version is None else f"{self.size}:{source.version}"
        self._windows: list[_Window] = []  # the most recently used last
        self._lock = threading.Lock()
        OPEN_FILES.add(self)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        size = max(0, min(size, self.size - offset))
        if size == 0:
            return b""
        if size > MAX_GAP_BYTES:
            return self._fetch(offset, size)
        with self._lock:
            window = self._find_window(offset, size)
            is_new = window is None
            if window is None:
                window = _Window(offset, max(size, self._next_window(offset)))
                self._windows = [*self._windows[1 - KEPT_WINDOWS :], window]
        if is_new:
            self._fill(window)
        data = window.data.result()  # another thread may have asked for it
        return data[offset - window.offset : offset - window.offset + size]

    def close(self) -> None:
        """Forget what was read."""
        self._windows = []
        OPEN_FILES.discard(self)

    def _find_window(self, offset: int, size: int) -> "_Window | None":
        for window in reversed(self._windows):
            if window.offset <= offset and offset + size <= window.offset + window.size:
                self._windows.remove(window)
                self._windows.append(window)
                return window
        return None

    def _next_window(self, offset: int) -> int:
        """Return how much to ask for: as far as another window at most, for threads do not come in order."""
        size = MIN_WINDOW_BYTES
        for window in reversed(self._windows):
            if window.offset <= offset <= window.offset + window.size + MAX_GAP_BYTES:
                size = min(2 * window.size, MAX_WINDOW_BYTES, ALL_WINDOWS_BYTES // max(len(OPEN_FILES), 1))
                break
        ends = [window.offset for window in self._windows if window.offset > offset]
        return min([max(size, MIN_WINDOW_BYTES), self.size - offset, *(end - offset for end in ends)])

    def _fill(self, window: "_Window") -> None:
        """Read a window; who waits for it fails as this thread does, and the next one asks again."""
        try:
            window.data.set_result(self._fetch(window.offset, window.size))
        except BaseException as error:
            with self._lock:
                self._windows = [each for each in self._windows if each is not window]
            window.data.set_exception(error)
            raise

    def _fetch(self, offset: int, size: int) -> bytes:
        if isinstance(self._source, _FsspecFile):
            self._source.require_ranges()

        def read_range() -> bytes:
            data = self._source.read(offset, size)
            if len(data) < size:
                raise StorageError(f"{len(data)} of {size} bytes came from byte {offset}")
            return data

        data = retry(self._url, read_range)
        if len(data) > size:
            raise UserError(f"{self._url}: {size} bytes were asked for and {len(data)} came: the range was ignored")
        return data


class _Window:
    """Bytes of a file that are there, or have been asked for."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size
        self.data: Future[bytes] = Future()


class _FsspecFile:
    """A file that its file system of fsspec reads; see `StoredObject`, raises as `RemoteFile` does."""

    def __init__(self, url: str, file_system: fsspec.AbstractFileSystem, path: str) -> None:
        self._url, self._file_system, self._path = url, file_system, path
        info = retry(url, lambda: file_system.info(path))
        if info.get("size") is None:
            raise UserError(f"{url}: the server does not tell the file's size, so it cannot be read by ranges")
        self.size = int(info["size"])
        self.version = next((str(info[field]) for field in VERSION_FIELDS if info.get(field)), None)
        # Other protocols have ranges. A web server may say that it has none, or has to be tried.
        is_web = url.startswith(("http://", "https://"))
        self._answers_ranges = info.get("partial") if is_web else True

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`."""
        return cast(bytes, self._file_system.cat_file(self._path, start=offset, end=offset + size))

    def require_ranges(self) -> None:
        """Make sure that a web server sends what is asked for, and not the whole file for every range."""
        if self._answers_ranges is None:
            self._answers_ranges = retry(self._url, self._probe_ranges)
        if not self._answers_ranges:
            raise UserError(
                f"{self._url}: the server does not answer range requests, so members cannot be read by their place in "
                "the tar; download the file and give its local path"
            )

    def _probe_ranges(self) -> bool:
        with self._file_system.open(self._path, "rb", size=self.size, cache_type="none") as file:
            try:
                file.seek(1)
                file.read(1)
            except ValueError:  # fsspec's word for an answer that is no range; the rest of it has not been read
                return False
        return True
