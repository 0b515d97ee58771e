"""The samples of a raw tar: members grouped by key from the headers, as webdataset names them, and never guessed at."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.raw.tar_headers import TarEntry

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "heic", "heif", "jxl")
)
DIALECT_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one file of a tar are."""

    offset: int
    size: int


@dataclass(slots=True)
class RawSample:
    """All members of one key; `reject` says why it cannot be used, `image_extension` which member is its image."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    image_extension: str | None = None
    reject: str | None = None


@dataclass(frozen=True, kw_only=True)
class GroupedSamples:
    """The samples in order of first appearance, and the names of members that are none."""

    samples: list[RawSample]
    unusable: list[str]


def group_samples(entries: Sequence[TarEntry], *, num_bytes: int) -> GroupedSamples:
    """Group a tar's members by key.

    The key is the name up to the first dot of its last part, which is webdataset's rule. A tar in which that rule
    finds no image at all, but the last dot does (`a.v1.jpg`, `a.v2.jpg`), is grouped by the last dot. Faulty samples
    carry a reason in `reject`:

    - `duplicate_member`: a member twice under one key;
    - `cut_off`: the tar ends inside one of its members;
    - `several_images`, `no_image`: of the members that are left, not exactly one is an image;
    - `dotted_name`: no image by the first dot, but one by the last, in a tar where other keys have theirs.

    Args:
        num_bytes: size of the tar.
    """
    files: list[tuple[str, TarEntry]] = []
    unusable: list[str] = []
    for entry in entries:
        name = entry.name.removeprefix("./")
        if entry.kind == "folder":
            continue
        if entry.kind == "other" or name.startswith("/") or ".." in name.split("/"):
            unusable.append(_readable(entry.name))
            continue
        files.append((name, entry))
    samples = _group(files, split_at_first_dot, num_bytes=num_bytes)
    if not _has_images(samples) and any(_hides_image(sample) for sample in samples):
        samples = _group(files, split_at_last_dot, num_bytes=num_bytes)
    for sample in samples:
        _choose_image(sample)
    return GroupedSamples(samples=samples, unusable=unusable)


def split_at_first_dot(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension as webdataset does; a name without either is all key."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return (folder + slash + stem, extension) if stem and extension else (name, "")


def split_at_last_dot(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension where dots belong to the key."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.rpartition(".")
    return (folder + slash + stem, extension) if stem and extension else (name, "")


def _group(
    files: Sequence[tuple[str, TarEntry]], split: Callable[[str], tuple[str, str]], *, num_bytes: int
) -> list[RawSample]:
    samples: dict[str, RawSample] = {}
    for name, entry in files:
        key, extension = split(name)
        key, extension = _readable(key), extension.lower()
        sample = samples.setdefault(key, RawSample(key))
        if extension in sample.members:
            sample.reject = "duplicate_member"
        elif entry.offset + entry.size > num_bytes:
            sample.reject = sample.reject or "cut_off"
        sample.members.setdefault(extension, Member(entry.offset, entry.size))
    return list(samples.values())


def _readable(name: str) -> str:
    # Names in an old encoding come with bytes that no UTF-8 file could hold; `\xe8` is readable and stays unique.
    if name.isascii():
        return name
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _has_images(samples: Sequence[RawSample]) -> bool:
    return any(not IMAGE_EXTENSIONS.isdisjoint(sample.members) for sample in samples)


def _hides_image(sample: RawSample) -> bool:
    return any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in sample.members)


def _choose_image(sample: RawSample) -> None:
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(images) == 1:
        sample.image_extension = images[0]
    elif images:
        sample.reject = sample.reject or "several_images"
    else:
        sample.reject = sample.reject or ("dotted_name" if _hides_image(sample) else "no_image")


def detect_dialect(samples: Sequence[RawSample]) -> str:
    """Return `imagenet`, `img2dataset`, `sa1b` or `generic`, from the members that the first good samples have."""
    good = (sample for sample in samples if sample.reject is None)
    first = list(itertools.islice(good, DIALECT_SAMPLES))
    if first and all("cls" in sample.members for sample in first):
        return "imagenet"
    if first and all("txt" in sample.members for sample in first) and any("json" in sample.members for sample in first):
        return "img2dataset"
    is_sa = first and all(re.fullmatch(r"(.*/)?sa_\d+", sample.key) and "json" in sample.members for sample in first)
    return "sa1b" if is_sa else "generic"
