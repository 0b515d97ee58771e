"""What a raw shard is called: outputs have its name, so it must be its own, and the same however a path is typed."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.raw.samples import IMAGE_EXTENSIONS
from pipelines.store.files import is_remote

# What a shard's name does not say of its file.
SHARD_SUFFIX = re.compile(
    r"\.(tar|parquet|pq|arrow|feather|(csv|tsv|tab|jsonl|ndjson|json|txt)(\.(gz|zst))?)", re.IGNORECASE
)
# Files of a data set's parts, and folders of images, are called so in all data sets: the folder above tells them apart.
PART = re.compile(
    r"(data|part|shard|chunk|train|training|test|testing|val|valid|validation|dev|default|images?|imgs?|metadata)?"
    r"[-_.]?\d*([-_]of[-_]\d+)?([-_][0-9a-f]{8,})?",
    re.IGNORECASE,
)
# These say nothing of the part either.
PLAIN_FOLDERS = ("data", "default")
MAX_FOLDERS = 3
TAR = ".tar"


def shard_name(path: str) -> str:
    """Return the name of a shard: that of its file or folder, without what follows `?` in a web address.

    `.tar`, `.parquet` and endings of tables are no part of it. Other files than tars, and folders, that are called as
    the parts of any data set (`train-00000-of-00002.parquet`, `images`) have the name of the folder above in front.
    """
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if len(name) > len(TAR) and name.endswith(TAR):
        return name.removesuffix(TAR)
    suffix = next((found for found in SHARD_SUFFIX.finditer(name) if found.end() == len(name)), None)
    stem = name[: suffix.start()] if suffix and suffix.start() else name
    is_tar = suffix is not None and suffix[1].lower() == "tar"
    if is_tar or not (PART.fullmatch(stem) or stem in ("", ".", "..")):
        return stem
    return "-".join(_with_folders(_parts(path), stem if suffix else ""))


def _parts(path: str) -> Sequence[str]:
    if is_remote(path):
        return path.rstrip("/").partition("://")[2].split("/")
    return os.path.normpath(Path(path.removeprefix("file://")).absolute()).split("/")


def _with_folders(parts: Sequence[str], stem: str) -> list[str]:
    """Return the folders above a file up to one with a name of its own, and the file's stem, or the last folder."""
    names = [stem or parts[-1]]
    for folder in reversed(parts[max(1, len(parts) - 1 - MAX_FOLDERS) : -1]):
        if not PART.fullmatch(names[0]):
            break
        if folder.lower() in PLAIN_FOLDERS:
            continue
        names.insert(0, folder)
    return names


def is_image_name(name: str) -> bool:
    """Whether a file is called as an image is."""
    return name[:1] != "." and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
