"""The headers of raw shards, read once: later commands and worker processes find them in `RUN/.headers/`.

A file there is a copy of what the tar says and can be deleted at any time. It counts only while the tar has the size
and time of change (remote: the version) that it had when it was read.
"""

import functools
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.engine.progress import get_logger, progress_bar
from pipelines.raw.samples import Member, RawSample, group_samples
from pipelines.raw.tar_headers import UnreadableTarError, read_tar
from pipelines.raw.texts import json_members, text_members
from pipelines.store.files import RangeFile, atomic_write_bytes, discard, is_remote, open_ranges, sha256_text
from pipelines.store.state_files import parse_state, state_of

FOLDER = ".headers"
# Raised when tars are grouped in another way, or the files change their form.
FORMAT_VERSION = 2
# Headers of remote shards are waited for, those of local ones computed: threads for the one, processes for the other.
NUM_THREADS = 16
SHARDS_PER_TASK = 16
MIN_SHARDS_PER_PROCESS = 64

log = get_logger("shards")


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a command needs to know of a shard before it opens it.

    Attributes:
        stamp: of the file that was read, see `RangeFile`.
        identity: see `TarContents`.
        num_texts: samples that have a text, or JSON that may hold one.
        unusable, strays: see `GroupedSamples`.
        fault: what is wrong with the tar as a whole, or None.
    """

    stamp: str | None
    identity: str
    num_samples: int
    num_texts: int
    unusable: list[str]
    strays: list[str]
    fault: str | None


@dataclass(frozen=True, kw_only=True)
class ShardHeaders:
    """All that a tar's headers say."""

    summary: ShardSummary
    samples: list[RawSample]


def read_headers(path: str, file: RangeFile) -> ShardHeaders:
    """Read and group the headers of the tar at `path`.

    Raises:
        UnreadableTarError: it is no tar; names it.
    """
    try:
        contents = read_tar(file)
    except UnreadableTarError as error:
        raise UnreadableTarError(f"{path} is not a readable tar: {error}") from None
    grouped = group_samples(contents.entries, num_bytes=file.size)
    summary = ShardSummary(
        stamp=file.stamp,
        identity=contents.identity,
        num_samples=len(grouped.samples),
        num_texts=sum(map(_has_text, grouped.samples)),
        unusable=grouped.unusable,
        strays=grouped.strays,
        fault=contents.fault,
    )
    return ShardHeaders(summary=summary, samples=grouped.samples)


def _has_text(sample: RawSample) -> bool:
    return bool(text_members(list(sample.members), sample.image_extension) or json_members(sample.key, sample.members))


class HeaderCache:
    """The folder of remembered headers of a run; `has_forgotten` when a damaged file was found and taken away."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self.has_forgotten = False

    def summary(self, path: str, stamp: str | None) -> ShardSummary | None:
        """Return what is known of the shard at `path`, or None if it has changed since or was never read."""
        file = self._file(path)
        if stamp is None or not file.is_file():
            return None
        with file.open("rb") as lines:
            return self._parse_summary(file, lines.readline(), stamp)

    def stamp(self, path: str) -> str | None:
        """Return the stamp that the shard at `path` had when its headers were read; None if that is not known."""
        file = self._file(path)
        if not file.is_file():
            return None
        with file.open("rb") as lines:
            try:
                return json.loads(lines.readline())["stamp"]
            except (ValueError, LookupError, TypeError):
                return None

    def headers(self, path: str, stamp: str | None) -> ShardHeaders | None:
        """Return all remembered headers of the shard at `path`, or None as `summary` does."""
        file = self._file(path)
        if stamp is None or not file.is_file():
            return None
        first, _, rest = file.read_bytes().partition(b"\n")
        summary = self._parse_summary(file, first, stamp)
        if summary is None:
            return None
        try:
            samples = [_load_sample(item) for item in json.loads(zlib.decompress(rest))]
        except (zlib.error, ValueError, TypeError) as error:
            return self._forget(file, str(error))
        return ShardHeaders(summary=summary, samples=samples)

    def remember(self, path: str, headers: ShardHeaders) -> None:
        """Write down the headers of the shard at `path`, unless its storage cannot tell when it changes."""
        if headers.summary.stamp is None:
            return
        first = json.dumps({"format": FORMAT_VERSION, "path": path, **asdict(headers.summary)})
        rest = json.dumps([_dump_sample(sample) for sample in headers.samples], separators=(",", ":"))
        atomic_write_bytes(self._file(path), first.encode() + b"\n" + zlib.compress(rest.encode(), level=1))

    def _parse_summary(self, file: Path, line: bytes, stamp: str) -> ShardSummary | None:
        try:
            content = parse_state(line, where=str(file), mend="", keys=("format", "stamp", "path"))
            if content.pop("format") != FORMAT_VERSION or content["stamp"] != stamp:
                return None
            del content["path"]
            return state_of(ShardSummary, content, where=str(file), mend="")
        except UserError as error:
            return self._forget(file, str(error).removeprefix(f"{file} ").rstrip("; "))

    def _forget(self, file: Path, reason: str) -> None:
        """Take a damaged file away: its tar is read again, and the headers remembered anew."""
        log.warning(f"{file} {reason}: the headers of its shard are read again")
        discard(file)
        self.has_forgotten = True

    def _file(self, path: str) -> Path:
        # `make caption` has the path as it was typed, later commands the absolute one.
        place = path if is_remote(path) else str(Path(path.removeprefix("file://")).absolute())
        return self._folder / f"{sha256_text(place)[:24]}.headers"


def _dump_sample(sample: RawSample) -> list[Any]:
    members = [[extension, member.offset, member.size] for extension, member in sample.members.items()]
    return [sample.key, sample.image_extension, sample.reject, members]


def _load_sample(item: list[Any]) -> RawSample:
    key, image_extension, reject, members = item
    found = {extension: Member(offset, size) for extension, offset, size in members}
    return RawSample(key=key, members=found, image_extension=image_extension, reject=reject)


def read_summaries(paths: Sequence[str], run: Path | None) -> list[ShardSummary | UnreadableTarError]:
    """Return what is to be known of each shard, or what is wrong with it; what was not remembered in `run` is read.

    Raises:
        StorageError: a shard cannot be read; names it.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = dict(zip(paths, pool.map(functools.partial(_recall_summary, run=run), paths), strict=True))
    unread = [path for path, summary in found.items() if summary is None]
    tasks = [unread[start : start + SHARDS_PER_TASK] for start in range(0, len(unread), SHARDS_PER_TASK)]
    read: dict[str, ShardSummary | UnreadableTarError] = {}
    with progress_bar("shards", len(unread), unit="shards") as progress:
        for task, summaries in zip(tasks, _run_tasks(tasks, run), strict=True):
            read.update(zip(task, summaries, strict=True))
            progress.advance(len(task), note="reading headers")
    return [summary or read[path] for path, summary in found.items()]


def _run_tasks(tasks: Sequence[list[str]], run: Path | None) -> Iterator[list[ShardSummary | UnreadableTarError]]:
    read = functools.partial(_read_some, run=run)
    num_processes = min(os.cpu_count() or 1, sum(map(len, tasks)) // MIN_SHARDS_PER_PROCESS)
    if num_processes < 2:
        yield from map(read, tasks)
        return
    # Not by fork: the threads of fsspec and Arrow would be missing in the child, and their locks held.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(read, tasks)


def _read_some(paths: Sequence[str], *, run: Path | None) -> list[ShardSummary | UnreadableTarError]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(functools.partial(_read_summary, run=run), paths))


def _recall_summary(path: str, *, run: Path | None) -> ShardSummary | None:
    if run is None:
        return None
    with open_ranges(path) as file:
        return HeaderCache(run).summary(path, file.stamp)


def _read_summary(path: str, *, run: Path | None) -> ShardSummary | UnreadableTarError:
    try:
        with open_ranges(path) as file:
            headers = read_headers(path, file)
    except UnreadableTarError as error:
        return error
    if run is not None:
        HeaderCache(run).remember(path, headers)
    return headers.summary
