"""What raw shards hold, looked at once: later commands and worker processes find it in `RUN/.headers/`.

A file there is a copy of what a tar's headers, a folder or a table say, and can be deleted at any time. It counts only
while the shard's files have the sizes and times of change (remote: the version) that they had when they were read.
"""

import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.kinds.local_files import FileFacts
from pipelines.raw.reading import Reading
from pipelines.raw.samples import Member, RawSample
from pipelines.raw.tables.row_texts import RowTexts
from pipelines.raw.tasks import no_garbage
from pipelines.raw.texts import TEXT_EXTENSIONS, json_members, text_members
from pipelines.store.files import atomic_write_bytes, discard, is_remote, sha256_text
from pipelines.store.state_files import parse_state, state_of

FOLDER = ".headers"
# Raised when samples are found in another way, or the files change their form.
FORMAT_VERSION = 7
ITEMS_PER_LINE = 4096
# Some twenty megabytes.
MAX_RECENT_SAMPLES = 1 << 14

# `rows` have their images in a column, those of a `table` have paths.
Kind = Literal["tar", "folder", "rows", "table"]

log = get_logger("shards")


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a command needs to know of a shard before it opens it.

    Attributes:
        stamp: of the file that was read, see `RangeFile`; of a folder that of `FolderContents`.
        image_column: that the rows were read by, see `Reading`.
        identity: see `RawShard`.
        rejects: of faulty samples, by reason, how many there are and what one is called.
        num_texts: samples that have a text, or JSON that may hold one.
        unknown_texts: of samples without one, how many have a text file under a name that is no known one, by name.
        has_labels: see `RawShard`.
        unusable, strays: see `GroupedSamples`.
        fault: what is wrong with the shard as a whole, or None.
    """

    kind: Kind
    stamp: str | None
    image_column: str | None
    identity: str
    num_samples: int
    rejects: dict[str, tuple[int, str]]
    num_texts: int
    has_labels: bool
    unusable: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unknown_texts: dict[str, int] = field(default_factory=dict)
    fault: str | None = None

    def is_of(self, stamp: str | None, reading: Reading) -> bool:
        """Whether a shard with that stamp would be read the same."""
        is_same = self.kind == "tar" or self.image_column == reading.image_column
        return stamp is not None and self.stamp == stamp and is_same


@dataclass(frozen=True, kw_only=True)
class ShardHeaders:
    """All that is known of a shard without its images and texts.

    Attributes:
        files: of a folder, or those that a table names; `Member.offset` is the number of one of them.
        tables: of a folder, names of its metadata, whose rows are numbered through all of them.
    """

    summary: ShardSummary
    samples: list[RawSample]
    files: Sequence[FileFacts] = ()
    tables: Sequence[str] = ()


def has_text(sample: RawSample) -> bool:
    """Whether a sample has a text, or JSON that may hold one, among its members."""
    members = sample.members
    return "txt" in members or bool(
        text_members(list(members), sample.image_extension) or json_members(sample.key, members)
    )


def count_rejects(samples: Sequence[RawSample]) -> dict[str, tuple[int, str]]:
    """Return how many samples are faulty, and the key of the first, by reason, the most frequent first."""
    keys: dict[str, list[str]] = {}
    for sample in samples:
        if sample.reject is not None:
            keys.setdefault(sample.reject, []).append(sample.key)
    return {reason: (len(found), found[0]) for reason, found in sorted(keys.items(), key=lambda item: -len(item[1]))}


def count_unknown_texts(samples: Sequence[RawSample]) -> dict[str, int]:
    """Return how many samples have `en.txt` and no text under a known name, by such names."""
    names: Counter[str] = Counter()
    for sample in samples:
        if "." in "".join(sample.members) and not text_members(list(sample.members), sample.image_extension):
            names.update(name for name in sample.members if name.rpartition(".")[2] in TEXT_EXTENSIONS)
    return dict(names)


def summary_of_rows(
    samples: Sequence[RawSample], texts: RowTexts, *, kind: Kind, stamp: str | None, identity: str, reading: Reading
) -> ShardSummary:
    """Return what is to be known of a shard whose samples are the rows of a table."""
    return ShardSummary(
        kind=kind,
        stamp=stamp,
        image_column=reading.image_column,
        identity=identity,
        num_samples=len(samples),
        rejects=count_rejects(samples),
        num_texts=len(samples) if texts.text_columns or reading.text_column in texts.columns else 0,
        has_labels=texts.has_labels(),
    )


class RecentHeaders:
    """Headers of small shards that this process has read itself; the first `MAX_RECENT_SAMPLES`, by path.

    A command that looks at shards and then reads them itself need not look twice. Whoever asks compares the stamp.
    """

    def __init__(self) -> None:
        self._by_path: dict[str, ShardHeaders] = {}
        self._num_samples = 0

    def headers(self, path: str) -> ShardHeaders | None:
        """Return what was read of the shard at `path`, or None."""
        return self._by_path.get(path)

    def remember(self, path: str, headers: ShardHeaders) -> None:
        """Keep the headers of the shard at `path`, if there is room."""
        former = self._by_path.pop(path, None)
        self._num_samples -= 0 if former is None else 1 + len(former.samples)
        if self._num_samples < MAX_RECENT_SAMPLES:
            self._by_path[path] = headers
            self._num_samples += 1 + len(headers.samples)


class HeaderCache:
    """The folder of remembered headers of a run; `has_forgotten` when a damaged file was found and taken away."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self.has_forgotten = False

    def summary(self, path: str) -> ShardSummary | None:
        """Return what was known of the shard at `path`, or None if it was never read; see `is_of`."""
        file = self._file(path)
        if not file.is_file():
            return None
        with file.open("rb") as lines:
            return self._parse_summary(file, lines.readline())

    def headers(self, path: str) -> ShardHeaders | None:
        """Return all that was known of the shard at `path`, or None as `summary` does."""
        file = self._file(path)
        if not file.is_file():
            return None
        first, _, rest = file.read_bytes().partition(b"\n")
        summary = self._parse_summary(file, first)
        if summary is None:
            return None
        try:
            return _load(summary, rest)
        except (zlib.error, ValueError, TypeError) as error:
            return self._forget(file, str(error))

    def remember(self, path: str, headers: ShardHeaders) -> None:
        """Write down the headers of the shard at `path`, unless its storage cannot tell when it changes."""
        if headers.summary.stamp is None:
            return
        first = json.dumps({"format": FORMAT_VERSION, "path": path, **asdict(headers.summary)})
        atomic_write_bytes(self._file(path), b"".join([first.encode(), b"\n", *_compressed(headers)]))

    def _parse_summary(self, file: Path, line: bytes) -> ShardSummary | None:
        try:
            content = parse_state(line, where=str(file), mend="", keys=("format", "stamp"))
            if content.pop("format") != FORMAT_VERSION:
                return None
            content.pop("path", None)
            return state_of(ShardSummary, content, where=str(file), mend="")
        except UserError as error:
            return self._forget(file, str(error).removeprefix(f"{file} ").rstrip("; "))

    def _forget(self, file: Path, reason: str) -> None:
        """Take a damaged file away: its shard is read again, and the headers remembered anew."""
        log.warning(f"{file} {reason}: the headers of its shard are read again")
        discard(file)
        self.has_forgotten = True

    def _file(self, path: str) -> Path:
        # `make caption` has the path as it was typed, later commands the absolute one.
        place = path if is_remote(path) else str(Path(path.removeprefix("file://")).absolute())
        return self._folder / f"{sha256_text(place)[:24]}.headers"


def _compressed(headers: ShardHeaders) -> Iterator[bytes]:
    """The tables, then samples and files, each as a line of JSON: of a million, a few at a time are objects."""
    compressor = zlib.compressobj(level=1)
    yield compressor.compress(_line(headers.tables))
    for start in range(0, max(len(headers.samples), len(headers.files)), ITEMS_PER_LINE):
        samples = [_dump_sample(sample) for sample in headers.samples[start : start + ITEMS_PER_LINE]]
        yield compressor.compress(_line([samples, headers.files[start : start + ITEMS_PER_LINE]]))
    yield compressor.flush()


def _line(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


@no_garbage()
def _load(summary: ShardSummary, rest: bytes) -> ShardHeaders:
    """Raises zlib.error, ValueError or TypeError if it is damaged."""
    lines = io.BytesIO(zlib.decompress(rest))
    tables: list[str] = json.loads(next(lines, b""))
    samples: list[RawSample] = []
    files: list[FileFacts] = []
    for line in lines:
        some_samples, some_files = json.loads(line)
        samples += [_load_sample(item) for item in some_samples]
        files += [FileFacts(*item) for item in some_files]
    return ShardHeaders(summary=summary, samples=samples, files=files, tables=tables)


def _dump_sample(sample: RawSample) -> list[Any]:
    members = [(extension, *member) for extension, member in sample.members.items()]
    return [sample.key, sample.image_extension, sample.reject, sample.row, members]


def _load_sample(item: list[Any]) -> RawSample:
    key, image_extension, reject, row, members = item
    found = {sys.intern(extension): Member(offset, size) for extension, offset, size in members}
    return RawSample(key=key, members=found, image_extension=image_extension, reject=reject, row=row)
