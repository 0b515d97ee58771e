"""The samples of a raw shard of files: members grouped by key from their names alone, and never guessed at.

In a tar the key is webdataset's, the name up to its first dot; in a folder it is the name without its extension. In
both `x.input.jpg` and `x.outputs.txt` are fields of `x`, and `x.jpg.txt` is the text of `x.jpg`.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.raw.kinds.tar_headers import TarEntry
from pipelines.raw.texts import TEXT_EXTENSIONS, TEXT_FIELDS, text_members

# What Pillow reads, and below what it does not: where a sample has one of each, as of phones, the first counts.
READABLE_EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "avif",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "jp2",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
    )
)
IMAGE_EXTENSIONS = READABLE_EXTENSIONS | {"heic", "heif", "jxl"}
# Names of the picture where a sample has several members.
IMAGE_FIELDS = ("image", "img", "input", "jpg", "jpeg", "png", "webp")
# Images that are made of the picture, and never taken for it.
CONTROL_FIELDS = ("mask", "seg", "depth", "canny", "edge", "hed", "pose", "normal", "control", "conditioning_image")
OTHER_FIELDS = ("metadata", "meta", "info")
FIELDS = frozenset((*IMAGE_FIELDS, *CONTROL_FIELDS, *OTHER_FIELDS, *(name.lower() for name in TEXT_FIELDS)))
# What archivers, systems and people put beside samples.
STRAY_FOLDER = re.compile(
    # GNU tar's headers of PAX become files where another program has unpacked them.
    r"__macosx|@eadir|\$recycle\.bin|system volume information|lost\+found|(paxheaders?|globalhead)(\.\d+)?",
    re.IGNORECASE,
)
STRAY_NAME = re.compile(
    r"(eh)?thumbs(_vista)?\.db|desktop\.ini|icon[\r\uf00d]?|~\$.*|"
    r"_(success|metadata|common_metadata|committed_.*|started_.*)|globalhead\..*|.*\.(md|md5|sha1|sha256|lock|log|html?)",
    re.IGNORECASE | re.DOTALL,
)
# Notes for people, whatever they end with, unless an image is called so, too.
NOTE = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|changelog|changes|contributing|citation|makefile|manifest|index|"
    r"(md5|sha1|sha256|sha512)sums?|checksums?)(\..*)?",
    re.IGNORECASE | re.DOTALL,
)
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][a-z]{2,4})?", re.IGNORECASE)
# In a tar, which is made for samples, these are of one whose image is lost; `""` is a file without extension.
ARRAY_EXTENSIONS = frozenset(("npy", "npz", "pt", "pth", "pkl", "pickle", "msgpack", "safetensors"))
DATA_EXTENSIONS = ARRAY_EXTENSIONS | {"", "json", "cls"}
# Texts about a whole collection, unless an image is called so, too.
TEXT_ABOUT_ALL = re.compile(
    r"(.*/)?(notes?|captions?|classes|class_?names|labels|names|prompts?|tags|info|about|credits|attribution|sources?|"
    r"urls?|links|list|files?|metadata|annotations|data(set)?|requirements|todo|train|val|valid|validation|test)",
    re.IGNORECASE,
)


class Member(NamedTuple):
    """Where the bytes of one file are: from `offset` in a tar; in a folder it is the number of the file."""

    offset: int
    size: int


@dataclass(slots=True)
class RawSample:
    """All members of one key; `reject` says why it cannot be used, `image_extension` which member is its image.

    `row` is the number of its row, where a table tells of it; a row with its image in a column has no members.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    image_extension: str | None = None
    reject: str | None = None
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class GroupedSamples:
    """The samples in order of first appearance, and the names of members that are none.

    Attributes:
        unusable: links, devices, and paths that leave the tar.
        strays: what belongs to no sample, such as `._x.jpg`, `__MACOSX/` and READMEs.
    """

    samples: list[RawSample]
    unusable: list[str]
    strays: list[str]


def group_samples(entries: Sequence[TarEntry], *, num_bytes: int) -> GroupedSamples:
    """Group a tar's members by key, by webdataset's rule: the key is the name up to the first dot of its last part.

    A tar in which that rule finds no image at all (`a.v1.jpg`, `a.v2.jpg`) is grouped as a folder is. Faulty samples
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
    strays: list[str] = []
    for entry in entries:
        name = entry.name.removeprefix("./")
        if entry.kind == "folder":
            continue
        if is_stray(name):
            strays.append(readable_name(entry.name))
        elif entry.kind == "other" or name.startswith("/") or ".." in name.split("/"):
            unusable.append(readable_name(entry.name))
        else:
            files.append((name, entry))
    samples = _group(files, split_at_first_dot, num_bytes=num_bytes)
    for sample in samples:
        _choose_image(sample)
    if not any(sample.image_extension for sample in samples) and any(map(_hides_image, samples)):
        samples = _group(files, split_at_extension, num_bytes=num_bytes)
        for sample in samples:
            _choose_image(sample)
    kept = _without_strays(samples, DATA_EXTENSIONS)
    return GroupedSamples(samples=kept, unusable=unusable, strays=[*strays, *_names_of_others(samples, kept)])


def group_files(entries: Sequence[TarEntry], *, named: Collection[str] = ()) -> GroupedSamples:
    """Group the files of a folder by key: the name without its extension; rejects as in `group_samples`.

    Several images that differ in their extension alone are samples each, with their whole names as keys, where
    metadata name one of them, or several have texts of their own (`e.jpg.txt` and `e.png.txt`). What is neither an
    image nor the text of one, such as a film or a table, is a stray.

    Args:
        named: the files that metadata name.
    """
    left_out = {entry.name for entry in entries if is_stray(entry.name)}
    strays = [readable_name(entry.name) for entry in entries if entry.name in left_out]
    files = [entry for entry in entries if entry.name not in left_out]
    apart = _keyed_by_whole_name([entry.name for entry in files], named)
    samples = _group(
        ((entry.name, entry) for entry in files),
        lambda name: apart.get(name) or split_at_extension(name),
        num_bytes=None,
    )
    samples = _join_lone_texts(samples)
    kept = _without_strays(samples)
    for sample in kept:
        _choose_image(sample)
    return GroupedSamples(samples=kept, unusable=[], strays=[*strays, *_names_of_others(samples, kept)])


def _may_be_sample(sample: RawSample, data_extensions: Collection[str] = ()) -> bool:
    """Whether the members of a key have an image, or data or a text that are not about the whole collection."""
    if _hides_image(sample):
        return True
    data = {extension.rpartition(".")[2] for extension in sample.members} & {*data_extensions}
    if is_note(sample.key):
        return bool(data & ARRAY_EXTENSIONS)
    if data:
        return True
    return bool(text_members(list(sample.members), None)) and TEXT_ABOUT_ALL.fullmatch(sample.key) is None


def _without_strays(samples: list[RawSample], data_extensions: Collection[str] = ()) -> list[RawSample]:
    """Leave out what `_may_be_sample` does, and texts without an image where no image has a text: none is lost there.

    Such texts are of images elsewhere, as in `images/1.jpg` and `captions/1.txt`, or no captions at all.
    """
    with_image = [sample for sample in samples if _hides_image(sample)]
    if len(with_image) == len(samples):
        return samples
    kept = [sample for sample in samples if _may_be_sample(sample, data_extensions)]
    if not with_image or any(any(_are_texts(sample)) for sample in with_image):
        return kept
    return [sample for sample in kept if not all(_are_texts(sample))]


def _are_texts(sample: RawSample) -> list[bool]:
    return [extension.rpartition(".")[2] in TEXT_EXTENSIONS for extension in sample.members]


def _names_of_others(samples: Sequence[RawSample], kept: Sequence[RawSample]) -> list[str]:
    """Return the names of the members of those samples that are not kept."""
    if len(samples) == len(kept):
        return []
    keys = {sample.key for sample in kept}
    others = [sample for sample in samples if sample.key not in keys]
    return [f"{sample.key}.{name}".removesuffix(".") for sample in others for name in sample.members]


def _join_lone_texts(samples: list[RawSample]) -> list[RawSample]:
    """Give each text in a language to its image: `a.en.txt` is a member `en.txt` of `a`, if there is no `a.en.jpg`."""
    with_image = {sample.key: sample for sample in samples if _hides_image(sample)}
    kept = []
    for sample in samples:
        key, _, language = sample.key.rpartition(".")
        image = with_image.get(key) if LANGUAGE.fullmatch(language) and sample.key not in with_image else None
        if image is None or not text_members(list(sample.members), None):
            kept.append(sample)
            continue
        for extension, member in sample.members.items():
            name = f"{language.lower()}.{extension}"
            if name in image.members:
                image.reject = "duplicate_member"
            image.members[name] = member
    return kept


def _keyed_by_whole_name(names: Sequence[str], named: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return key and extension of images that would share a key and are told apart, and of their own texts."""
    first: dict[str, str] = {}
    images: dict[str, list[str]] = {}  # of keys that several have
    texts: dict[str, list[str]] = {}
    for name in names:
        key, extension = split_at_extension(name)
        if extension.lower() in IMAGE_EXTENSIONS:
            other = first.setdefault(key, name)
            if other is not name:
                images.setdefault(key, [other]).append(name)
        elif "." in extension and extension.lower().rpartition(".")[2] in TEXT_EXTENSIONS:
            texts.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, tuple[str, str]] = {}
    for same in images.values():
        readable = [name for name in same if name.rpartition(".")[2].lower() in READABLE_EXTENSIONS]
        is_named = any(name in named and readable != [name] for name in same)
        if is_named or sum(name in texts for name in same) > 1:
            for name in same:
                extension = name.rpartition(".")[2]
                found[name] = (name, extension)
                for text in texts.get(name, []):
                    found[text] = (name, f"{extension}.{text.rpartition('.')[2]}")
    return found


def is_stray(name: str) -> bool:
    """Whether a file is by its name no part of a sample: hidden, or of an archiver or a system."""
    folder, _, file_name = name.rpartition("/")
    if file_name.startswith(".") or STRAY_NAME.fullmatch(file_name) is not None:
        return True
    return bool(folder) and any(map(is_stray_folder, folder.split("/")))


def is_stray_folder(name: str) -> bool:
    """Whether a folder is hidden, or of an archiver or a system."""
    return (name.startswith(".") and bool(name.strip("."))) or STRAY_FOLDER.fullmatch(name) is not None


def is_note(name: str) -> bool:
    """Whether what is no image is a note for people: a README, a licence, a list of checksums."""
    return NOTE.fullmatch(name.rpartition("/")[2]) is not None


def split_at_first_dot(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension as webdataset does; a name without either is all key."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return (folder + slash + stem, extension) if stem and extension else (name, "")


def split_at_extension(name: str) -> tuple[str, str]:
    """Split a file's name into key and extension where dots belong to the key.

    `a.v1.jpg` is `a.v1` and `jpg`; `a.v1.jpg.txt` is `a.v1` and `jpg.txt`, and `a.input.jpg` is `a` and `input.jpg`.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.rpartition(".")
    if not stem or not extension:
        return name, ""
    rest, _, last = stem.rpartition(".")
    is_beside = last.lower() in IMAGE_EXTENSIONS and extension.lower() not in IMAGE_EXTENSIONS
    if rest and (is_beside or last.lower() in FIELDS):
        stem, extension = rest, f"{last}.{extension}"
    return folder + slash + stem, extension


def _group(
    files: Iterable[tuple[str, TarEntry]], split: Callable[[str], tuple[str, str]], *, num_bytes: int | None
) -> list[RawSample]:
    samples: dict[str, RawSample] = {}
    for name, entry in files:
        key, extension = split(name)
        key, extension = readable_name(key), sys.intern(extension.lower())
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = RawSample(key)
        if extension in sample.members:
            sample.reject = "duplicate_member"
        elif num_bytes is not None and entry.offset + entry.size > num_bytes:
            sample.reject = sample.reject or "cut_off"
        if extension not in sample.members:
            sample.members[extension] = Member(entry.offset, entry.size)
    return list(samples.values())


def readable_name(name: str) -> str:
    """Return a name that any file can hold: bytes that are not UTF-8 are spelled out, so that it stays unique."""
    if name.isascii():
        return name
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _hides_image(sample: RawSample) -> bool:
    return not IMAGE_EXTENSIONS.isdisjoint([extension.rpartition(".")[2] for extension in sample.members])


def _choose_image(sample: RawSample) -> None:
    found = _images(sample)
    if len(found) == 1:
        sample.image_extension = found[0]
    elif found:
        sample.reject = sample.reject or "several_images"
    else:
        sample.reject = sample.reject or ("dotted_name" if _hides_image(sample) else "no_image")


def _images(sample: RawSample) -> list[str]:
    """Return the members that may be the image: those called so by extension, else the first field that is one."""
    plain = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if not plain:
        fields = [extension for extension in sample.members if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        of_field = {name: [image for image in fields if image.rpartition(".")[0] == name] for name in IMAGE_FIELDS}
        plain = next(filter(None, of_field.values()), [])
    readable = [extension for extension in plain if extension.rpartition(".")[2] in READABLE_EXTENSIONS]
    return readable if len(readable) == 1 else plain
