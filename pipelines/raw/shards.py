"""Raw shards: webdataset tars as their makers ship them, found by pattern and read by place."""

import contextlib
import fnmatch
import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import MissingFileError, StorageError, UserError
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.samples import Member, RawSample
from pipelines.raw.shard_headers import HeaderCache, ShardHeaders, ShardSummary, read_headers, read_summaries
from pipelines.raw.tar_headers import UnreadableTarError
from pipelines.store.files import RangeFile, atomic_write_json, is_remote, open_ranges
from pipelines.store.remote import list_urls
from pipelines.store.state_files import read_state, state_of

REMEMBERED_NAME = "shards.json"
FAULTS_NAMED = 5
NAMES_SHOWN = 3
MAX_LABEL = 2**31 - 1
MAX_LABEL_DIGITS = 100
RUN_PLACE = "\0"  # in a pattern, as no path has it
BRACE = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")

log = get_logger("shards")


def shard_name(path: str) -> str:
    """Return the name of a shard: its file name without `.tar`, `.parquet` and what follows `?` in a web address."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".tar").removesuffix(".parquet")


def expand_braces(pattern: str) -> list[str]:
    """Expand `{0000..0012}` (zero-padded as written) and `{a,b}`, several times in a pattern if need be."""
    match = BRACE.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    if numbers := NUMBER_RANGE.fullmatch(body):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") and len(first) > 1 else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _split_commas(spec: str) -> list[str]:
    # Commas inside braces belong to the brace.
    depth, parts = 0, [""]
    for character in spec:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def expand_shards(spec: str | Sequence[str], *, run: Path | None = None) -> list[str]:
    """Turn brace ranges, globs, folders and fsspec URLs (comma-separated or a list) into sorted paths of tars.

    `{run}` stands for the folder `run`, whose own commas, braces and brackets are no pattern.

    Raises:
        MissingFileError: a pattern matches nothing.
        UserError: two shards have the same name, which would make them overwrite each other's outputs; or a path is
            a pipe; or see `open_file_system`.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    if run is not None:
        patterns = [pattern.replace("{run}", RUN_PLACE) for pattern in patterns]
    expanded = [path for pattern in patterns for part in _split_commas(pattern) for path in expand_braces(part)]
    paths = [path for pattern in expanded for path in _match(pattern, str(run))]
    by_name: dict[str, str] = {}
    for path in sorted(paths):
        other = by_name.setdefault(shard_name(path), path)
        if other != path:
            raise UserError(f"data.shards: {other} and {path} have the same name {shard_name(path)!r}")
    return [by_name[name] for name in sorted(by_name)]


def _match(pattern: str, run: str) -> list[str]:
    # In a web address `?` begins the query.
    magic = "*[" if pattern.startswith(("http://", "https://")) else "*?["
    has_magic = any(character in pattern for character in magic)
    globbed = pattern.removeprefix("file://").replace(RUN_PLACE, glob.escape(run))
    pattern = pattern.replace(RUN_PLACE, run)
    path = Path(pattern.removeprefix("file://"))
    if is_remote(pattern):
        # Whether a single remote shard is there is found when it is opened.
        found = list_urls(pattern) if has_magic or pattern.endswith("/") else [pattern]
    elif path.is_dir():
        found = [str(tar) for tar in path.glob("*.tar")]
    elif has_magic and not path.is_file():
        anchor = path.anchor or "."
        found = [str(tar) for tar in Path(anchor).glob(str(Path(globbed)).removeprefix(path.anchor))]
    elif path.exists() and not path.is_file():
        raise UserError(f"data.shards: {path} is a stream; members are read by their place, so a shard must be a file")
    else:
        found = [str(path)] if path.is_file() else []
    if not found:
        raise MissingFileError(f"data.shards: no shard matches {pattern}")
    return found


def select_shards(paths: Sequence[str], patterns: Sequence[str], *, key: str) -> list[str]:
    """Return the paths whose shard name matches one of `patterns` (fnmatch), in the given order.

    Raises:
        UserError: a pattern matches no shard; names the recipe `key`, the pattern and some of the shards there are.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(shard_name(path), pattern) for path in paths):
            some = ", ".join(shard_name(path) for path in paths[:3]) or "no shards"
            raise UserError(f"{key}: pattern {pattern!r} matches none of the {len(paths)} shards ({some}, ...)")
    return [path for path in paths if any(fnmatch.fnmatchcase(shard_name(path), pattern) for pattern in patterns)]


class RawShard:
    """An open raw tar: samples in order of first appearance, read by place, from any thread.

    Attributes:
        name: file name without `.tar`.
        dialect: `img2dataset`, `sa1b`, `imagenet` or `generic`.
        identity: see `TarContents`.
        samples: one `RawSample` per key; those with `reject` set are faulty, see `group_samples`.
        unusable: names of links, devices and paths that leave the tar; they are not samples and are listed apart.
        fault: what is wrong with the tar as a whole, such as that it is cut off; None if nothing is.
    """

    def __init__(self, path: str, file: RangeFile, headers: ShardHeaders, *, dialect: str) -> None:
        self.path = path
        self.name = shard_name(path)
        self._file = file
        self.samples = headers.samples
        self.identity = headers.summary.identity
        self.unusable = headers.summary.unusable
        self.fault = headers.summary.fault
        self.dialect = headers.summary.dialect if dialect == "auto" else dialect

    def read(self, member: Member) -> bytes:
        """Return a member's bytes.

        Raises:
            StorageError: they cannot be had, or the tar has become shorter; names the shard.
        """
        data = self._file.read(member.offset, member.size)
        if len(data) != member.size:
            raise StorageError(
                f"{self.path}: ends at byte {member.offset + len(data):,}; it has changed while it was read"
            )
        return data

    def image_bytes(self, sample: RawSample) -> bytes:
        """Return the encoded image of a sample that is not rejected."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self.read(sample.members[sample.image_extension])

    def alt_text(self, sample: RawSample) -> str | None:
        """Return the text that came with the image, or None.

        Undecodable bytes of a text file become U+FFFD, half a surrogate pair in JSON `?`: the text is valid UTF-8.

        Raises:
            ValueError: the JSON that would hold it is no JSON, or nested too deeply.
        """
        if self.dialect == "sa1b":
            return None
        for extension in ("txt", "caption", "text"):
            if extension in sample.members:
                return self.read(sample.members[extension]).decode("utf-8", errors="replace").strip()
        if self.dialect == "img2dataset" and "json" in sample.members:
            try:
                record = json.loads(self.read(sample.members["json"]))
            except RecursionError as error:
                raise ValueError(f"JSON nested too deeply: {error}") from None
            caption = record.get("caption") if isinstance(record, dict) else None
            return caption.encode("utf-8", errors="replace").decode() if isinstance(caption, str) else None
        return None

    def label(self, sample: RawSample) -> int | None:
        """Return the class of an ImageNet-style sample (`.cls`), or None where there is none that fits int32."""
        if "cls" not in sample.members:
            return None
        text = self.read(sample.members["cls"]).decode("ascii", errors="replace").strip()
        # Python refuses to read a number of thousands of digits.
        if not text.isdecimal() or len(text) > MAX_LABEL_DIGITS:
            return None
        label = int(text)
        return label if label <= MAX_LABEL else None


@contextlib.contextmanager
def open_shard(
    path: str, dialect: str = "auto", *, run: Path | None = None, identity: str | None = None
) -> Iterator[RawShard]:
    """Open a raw tar, local or remote, with its members grouped by key.

    Args:
        dialect: how members are to be read; `auto` looks at them.
        run: where headers that a command has read before are found; without it they are read from the tar.
        identity: of the tar that is expected.

    Raises:
        UserError: the file is not a tar, cannot be read by place, or has changed; names the shard.
        StorageError: it cannot be read; names the shard.
    """
    with open_ranges(path) as file:
        cache = HeaderCache(run) if run else None
        headers = cache.headers(path, file.stamp) if cache else None
        if headers is None:
            headers = read_headers(path, file)
            if cache and cache.has_forgotten:
                cache.remember(path, headers)
        if identity not in (None, headers.summary.identity):
            raise UserError(f"{path} has changed since this command began; run it again")
        yield RawShard(path, file, headers, dialect=dialect)
        if is_remote(path):
            # A local file that is replaced stays open as it was; of a remote one, later ranges would be another's.
            with open_ranges(path) as again:
                if again.stamp != file.stamp:
                    raise UserError(f"{path} has changed while it was read; run the command again")


@dataclass(frozen=True, kw_only=True)
class ShardDescription:
    """A shard as a source for `run_over_shards`, and its dialect."""

    source: Source
    dialect: str


def describe_shards(paths: Sequence[str], *, dialect: str = "auto", run: Path | None = None) -> list[ShardDescription]:
    """Describe raw tars, in order, from their headers; with `run`, those are read once and remembered there.

    Tars that are cut off or damaged are logged: what can be read of them is used.

    Raises:
        UserError: some files are no tars, or cannot be read by place; names them.
        StorageError: a shard cannot be read; names it.
    """
    summaries = read_summaries(paths, run)
    if errors := [str(summary) for summary in summaries if isinstance(summary, UnreadableTarError)]:
        more = [f"and {len(errors) - FAULTS_NAMED} more"] if len(errors) > FAULTS_NAMED else []
        raise UserError("\n".join([*errors[:FAULTS_NAMED], *more]))
    described = []
    for path, summary in zip(paths, summaries, strict=True):
        assert isinstance(summary, ShardSummary), "errors have been raised"
        if summary.fault is not None:
            log.warning(f"{path}: {summary.fault}")
        if summary.unusable:
            some = ", ".join(summary.unusable[:NAMES_SHOWN]) + (", ..." if len(summary.unusable) > NAMES_SHOWN else "")
            log.warning(f"{path}: {len(summary.unusable)} members are no samples: {some}")
        source = Source(name=shard_name(path), path=path, identity=summary.identity, num_samples=summary.num_samples)
        described.append(ShardDescription(source=source, dialect=summary.dialect if dialect == "auto" else dialect))
    return described


def shard_source(path: str, *, dialect: str = "auto") -> Source:
    """Describe one raw tar as a source for `run_over_shards`; reads its headers."""
    return describe_shards([path], dialect=dialect)[0].source


def remember_shards(run: Path, paths: Sequence[str]) -> None:
    """Note in `RUN/shards.json` where shards were found, so that SHARDS need not be typed for every command."""
    known = _remembered(run)
    found = known | {shard_name(path): path if is_remote(path) else str(Path(path).absolute()) for path in paths}
    if found != known:
        atomic_write_json(run / REMEMBERED_NAME, found)


def recall_shards(run: Path) -> list[str]:
    """Return the shards that earlier commands have read for this run, sorted by name."""
    return [path for _, path in sorted(_remembered(run).items())]


def _remembered(run: Path) -> dict[str, str]:
    path = run / REMEMBERED_NAME
    if not path.is_file():
        return {}
    mend = "remove it and say SHARDS once more, as for the first command of the run"
    return state_of(dict[str, str], read_state(path, mend=mend), where=str(path), mend=mend)
