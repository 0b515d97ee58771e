"""Raw shards: webdataset tars as their makers ship them, grouped by key from the tar's headers and never guessed at."""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import fsspec

from pipelines.pieces import Source
from pipelines.storage import atomic_write_json, is_remote, open_binary

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TAIL_BYTES = 512
REMEMBERED_NAME = "shards.json"
BRACE = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass
class RawSample:
    """All members of one key; `reject` says why it cannot be used, `image_extension` which member is its image."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    image_extension: str | None = None
    reject: str | None = None


def shard_name(path: str) -> str:
    """Return the name of a shard: its file name without `.tar`, `.parquet`."""
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


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Turn brace ranges, globs, folders and fsspec URLs (comma-separated or a list) into sorted paths of tars.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: two shards have the same name, which would make them overwrite each other's outputs.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    expanded = [path for pattern in patterns for part in _split_commas(pattern) for path in expand_braces(part)]
    paths = [path for pattern in expanded for path in _match(pattern)]
    by_name: dict[str, str] = {}
    for path in sorted(paths):
        other = by_name.setdefault(shard_name(path), path)
        if other != path:
            raise ValueError(f"data.shards: {other} and {path} have the same name {shard_name(path)!r}")
    return [by_name[name] for name in sorted(by_name)]


def _match(pattern: str) -> list[str]:
    if is_remote(pattern):
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if not any(character in pattern for character in "*?["):
            return [pattern]
        found = [str(filesystem.unstrip_protocol(name)) for name in filesystem.glob(path)]
    elif Path(pattern).is_dir():
        found = [str(path) for path in Path(pattern).glob("*.tar")]
    elif any(character in pattern for character in "*?["):
        anchor = Path(pattern).anchor
        found = [str(path) for path in Path(anchor or ".").glob(pattern.removeprefix(anchor))]
    else:
        found = [pattern] if Path(pattern).is_file() else []
    if not found:
        raise FileNotFoundError(f"data.shards: no shard matches {pattern}")
    return found


def select_shards(paths: Sequence[str], patterns: Sequence[str], *, key: str) -> list[str]:
    """Return the paths whose shard name matches one of `patterns` (fnmatch), in the given order.

    Raises:
        ValueError: a pattern matches no shard; names the recipe `key`, the pattern and some of the shards there are.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(shard_name(path), pattern) for path in paths):
            some = ", ".join(shard_name(path) for path in paths[:3]) or "no shards"
            raise ValueError(f"{key}: pattern {pattern!r} matches none of the {len(paths)} shards ({some}, ...)")
    return [path for path in paths if any(fnmatch.fnmatchcase(shard_name(path), pattern) for pattern in patterns)]


class RawShard:
    """An open raw tar: samples in order of first appearance, read by offset.

    Attributes:
        name: file name without `.tar`.
        dialect: `img2dataset`, `sa1b`, `imagenet` or `generic`.
        identity: hex digest over every header and the last block of every payload, so that a changed shard is
            noticed without reading it whole.
        samples: one `RawSample` per key; those with `reject` set are faulty (`duplicate_member`, `no_image`,
            `several_images`, `cut_off`).
        unusable: names of links, devices and paths that leave the tar; they are not samples and are listed apart.
    """

    def __init__(self, path: str, file: BinaryIO, dialect: str) -> None:
        self.path = path
        self.name = shard_name(path)
        self._file = file
        self.samples, self.identity, self.unusable = _group_members(path, file)
        self.dialect = _detect_dialect(self.samples) if dialect == "auto" else dialect

    def read(self, member: Member) -> bytes:
        """Return a member's bytes."""
        self._file.seek(member.offset)
        return self._file.read(member.size)

    def image_bytes(self, sample: RawSample) -> bytes:
        """Return the encoded image of a sample that is not rejected."""
        assert sample.image_extension is not None, f"{self.name}: {sample.key} has no image"
        return self.read(sample.members[sample.image_extension])

    def alt_text(self, sample: RawSample) -> str | None:
        """Return the text that came with the image, or None; undecodable bytes of a text file become U+FFFD.

        Raises:
            ValueError: the JSON that would hold it is no JSON.
        """
        if self.dialect == "sa1b":
            return None
        for extension in ("txt", "caption", "text"):
            if extension in sample.members:
                return self.read(sample.members[extension]).decode("utf-8", errors="replace").strip()
        if self.dialect == "img2dataset" and "json" in sample.members:
            record = json.loads(self.read(sample.members["json"]))
            caption = record.get("caption") if isinstance(record, dict) else None
            return caption if isinstance(caption, str) else None
        return None

    def label(self, sample: RawSample) -> int | None:
        """Return the class of an ImageNet-style sample (`.cls`), or None where there is none."""
        if "cls" not in sample.members:
            return None
        text = self.read(sample.members["cls"]).decode("ascii", errors="replace").strip()
        return int(text) if text.isdecimal() else None


@contextlib.contextmanager
def open_shard(path: str, dialect: str = "auto") -> Iterator[RawShard]:
    """Open a raw tar, local or remote, and group its members by key.

    Raises:
        ValueError: the file is not a tar at all, or cannot seek; names the shard.
    """
    with open_binary(path) as file:
        if not file.seekable():
            raise ValueError(f"{path}: this storage cannot seek, so members cannot be grouped by key")
        yield RawShard(path, file, dialect)


def _group_members(path: str, file: BinaryIO) -> tuple[list[RawSample], str, list[str]]:
    samples: dict[str, RawSample] = {}
    unusable: list[str] = []
    digest = hashlib.sha256()
    size = file.seek(0, 2)
    for info in _headers(path, file):
        file.seek(max(0, info.offset_data + info.size - TAIL_BYTES))
        digest.update(
            f"{info.name}\0{info.size}\0{int(info.mtime)}\0{info.offset_data}\0".encode(errors="surrogateescape")
        )
        digest.update(file.read(min(TAIL_BYTES, info.size)))
        name = info.name.removeprefix("./")
        if info.isdir():
            continue
        if not info.isreg() or name.startswith("/") or ".." in name.split("/"):
            unusable.append(info.name)
            continue
        _add_member(
            samples,
            name,
            Member(info.name, info.offset_data, info.size),
            is_cut=info.offset_data + info.size > size,
        )
    for sample in samples.values():
        _choose_image(sample)
    digest.update(str(size).encode())
    return list(samples.values()), digest.hexdigest(), unusable


def _headers(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    file.seek(0)
    try:
        archive = tarfile.open(fileobj=file, mode="r:", ignore_zeros=False)  # noqa: SIM115 - the caller owns the file
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar: {error}") from None
    while True:
        try:
            info = archive.next()
        except (tarfile.TarError, OSError):
            # A tar cut in the middle: what came before is usable, and the last member is seen to be cut by its size.
            return
        if info is None:
            return
        yield info


def _add_member(samples: dict[str, RawSample], name: str, member: Member, *, is_cut: bool) -> None:
    folder, _, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    if not stem or not extension:
        stem, extension = file_name, ""
    key = f"{folder}/{stem}" if folder else stem
    # Names in an old encoding come with bytes that no UTF-8 file could hold; `\xe8` is readable and stays unique.
    key = key.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
    sample = samples.setdefault(key, RawSample(key))
    extension = extension.lower()
    if extension in sample.members:
        sample.reject = "duplicate_member"
    elif is_cut:
        sample.reject = sample.reject or "cut_off"
    sample.members.setdefault(extension, member)


def _choose_image(sample: RawSample) -> None:
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(images) == 1:
        sample.image_extension = images[0]
    sample.reject = sample.reject or (None if len(images) == 1 else "several_images" if images else "no_image")


def _detect_dialect(samples: Sequence[RawSample]) -> str:
    first = list(itertools.islice((sample for sample in samples if sample.reject is None), 100))
    if first and all("cls" in sample.members for sample in first):
        return "imagenet"
    if first and all("txt" in sample.members for sample in first) and any("json" in sample.members for sample in first):
        return "img2dataset"
    is_sa = first and all(re.fullmatch(r"(.*/)?sa_\d+", sample.key) and "json" in sample.members for sample in first)
    return "sa1b" if is_sa else "generic"


def shard_source(path: str, *, dialect: str = "auto") -> Source:
    """Describe a raw tar as a source for `run_over_shards`; reads its headers."""
    with open_shard(path, dialect) as raw:
        return Source(name=raw.name, path=path, identity=raw.identity, num_samples=len(raw.samples))


def remember_shards(run: Path, paths: Sequence[str]) -> None:
    """Note in `RUN/shards.json` where shards were found, so that SHARDS need not be typed for every stage."""
    known = _remembered(run)
    found = known | {shard_name(path): path if is_remote(path) else str(Path(path).absolute()) for path in paths}
    if found != known:
        atomic_write_json(run / REMEMBERED_NAME, found)


def recall_shards(run: Path) -> list[str]:
    """Return the shards that earlier stages of the run have read, sorted by name."""
    return [path for _, path in sorted(_remembered(run).items())]


def _remembered(run: Path) -> dict[str, str]:
    path = run / REMEMBERED_NAME
    return json.loads(path.read_text()) if path.is_file() else {}
