"""The headers of raw shards, read once: later commands and worker processes find them in `RUN/.headers/`.

A file there is a copy of what the tar says and can be deleted at any time. It counts only while the tar has the size
and time of change (remote: the version) that it had when it was read.
"""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.raw_samples import Member, RawSample, detect_dialect, group_samples
from pipelines.storage import RangeFile, atomic_write_bytes, is_remote, sha256_text
from pipelines.tar_headers import read_tar

FOLDER = ".headers"
# Raised when tars are grouped in another way, or the files change their form.
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a command needs to know of a shard before it opens it.

    Attributes:
        stamp: of the file that was read, see `RangeFile`.
        identity: see `TarContents`.
        dialect: as detected.
        unusable: names of members that are no samples: links, devices, paths that leave the tar.
        fault: what is wrong with the tar as a whole, or None.
    """

    stamp: str | None
    identity: str
    dialect: str
    num_samples: int
    unusable: list[str]
    fault: str | None


@dataclass(frozen=True, kw_only=True)
class ShardHeaders:
    """All that a tar's headers say."""

    summary: ShardSummary
    samples: list[RawSample]


def read_headers(file: RangeFile) -> ShardHeaders:
    """Read and group the headers of a tar; raises ValueError if it is none."""
    contents = read_tar(file)
    grouped = group_samples(contents.entries, num_bytes=file.size)
    summary = ShardSummary(
        stamp=file.stamp,
        identity=contents.identity,
        dialect=detect_dialect(grouped.samples),
        num_samples=len(grouped.samples),
        unusable=grouped.unusable,
        fault=contents.fault,
    )
    return ShardHeaders(summary=summary, samples=grouped.samples)


class HeaderCache:
    """The folder of remembered headers of a run."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER

    def summary(self, path: str, stamp: str | None) -> ShardSummary | None:
        """Return what is known of the shard at `path`, or None if it has changed since or was never read."""
        file = self._file(path)
        if stamp is None or not file.is_file():
            return None
        with file.open("rb") as lines:
            return _parse_summary(lines.readline(), stamp)

    def headers(self, path: str, stamp: str | None) -> ShardHeaders | None:
        """Return all remembered headers of the shard at `path`, or None as `summary` does."""
        file = self._file(path)
        if stamp is None or not file.is_file():
            return None
        first, _, rest = file.read_bytes().partition(b"\n")
        summary = _parse_summary(first, stamp)
        if summary is None:
            return None
        return ShardHeaders(summary=summary, samples=[_load_sample(item) for item in json.loads(zlib.decompress(rest))])

    def remember(self, path: str, headers: ShardHeaders) -> None:
        """Write down the headers of the shard at `path`, unless its storage cannot tell when it changes."""
        if headers.summary.stamp is None:
            return
        first = json.dumps({"format": FORMAT_VERSION, "path": path, **asdict(headers.summary)})
        rest = json.dumps([_dump_sample(sample) for sample in headers.samples], separators=(",", ":"))
        atomic_write_bytes(self._file(path), first.encode() + b"\n" + zlib.compress(rest.encode(), level=1))

    def _file(self, path: str) -> Path:
        # `make caption` has the path as it was typed, later stages the absolute one.
        place = path if is_remote(path) else str(Path(path.removeprefix("file://")).absolute())
        return self._folder / f"{sha256_text(place)[:24]}.headers"


def _parse_summary(line: bytes, stamp: str) -> ShardSummary | None:
    content = json.loads(line)
    if content.pop("format") != FORMAT_VERSION or content["stamp"] != stamp:
        return None
    del content["path"]
    return ShardSummary(**content)


def _dump_sample(sample: RawSample) -> list[Any]:
    members = [[extension, member.offset, member.size] for extension, member in sample.members.items()]
    return [sample.key, sample.image_extension, sample.reject, members]


def _load_sample(item: list[Any]) -> RawSample:
    key, image_extension, reject, members = item
    found = {extension: Member(offset, size) for extension, offset, size in members}
    return RawSample(key=key, members=found, image_extension=image_extension, reject=reject)
