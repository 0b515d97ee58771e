"""Which raw shards a user means: braces, globs, folders and URLs to paths, and what a run remembers of them."""

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command, typed_path
from pipelines.raw.kinds.folder_kinds import refuse_images, shards_in
from pipelines.raw.shard_names import shard_name
from pipelines.store.files import is_remote
from pipelines.store.remote import list_urls

RUN_PLACE = "\0"  # in a pattern, as no path has it
BRACE = re.compile(r"\{([^{}]*)\}")
GLOB = "*?["
HUB_DATA_SET = re.compile(r"hf://datasets/[^/*?\[]+/[^/*?\[]+")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """Expand `{0000..0012}` (zero-padded as written) and `{a,b}`, several times in a pattern if need be."""
    match = BRACE.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    if numbers := NUMBER_RANGE.fullmatch(body):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") and len(first) > 1 else 0
        low, high = sorted((int(first), int(last)))
        choices = [str(number).zfill(width) for number in range(low, high + 1)]
    else:
        choices = body.split(",")
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _split_commas(spec: str, run: str) -> list[str]:
    """Split at commas, but not those inside braces, nor those in the name of a file or folder that exists."""
    depth, parts = 0, [""]
    for character in spec:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    joined = []
    while parts:
        lengths = range(len(parts), 1, -1)
        length = next((length for length in lengths if _is_one_path(parts[:length], run)), 1)
        joined.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [part for part in joined if part]


def _is_one_path(parts: Sequence[str], run: str) -> bool:
    """Whether what exists of the path that the parts make together reaches into the last one."""
    *before, last = (part.replace(RUN_PLACE, run) for part in parts)
    joined = ",".join([*before, last]).strip()
    if is_remote(joined):
        return False
    start, _ = _existing_start(str(_local(joined)))
    return len(start) > len(str(_local(",".join(before).lstrip()))) + 1


def _local(path: str) -> Path:
    """Return a local path with `~` filled in."""
    return typed_path(path.removeprefix("file://"))


def expand_shards(spec: str | Sequence[str], *, run: Path | None = None) -> list[str]:
    """Turn brace ranges, globs, folders and fsspec URLs (comma-separated or a list) into sorted paths of shards.

    A folder is its tars, its Parquet and Arrow files, or, of images, one shard; see `shards_in`.
    What exists is taken as it is before it is taken for a pattern, and so is the folder at the beginning of one.
    `{run}` stands for the folder `run`, whose own commas, braces and brackets are no pattern.

    Raises:
        MissingFileError: a pattern matches nothing.
        UserError: two shards have the same name, which would make them overwrite each other's outputs; or a path is
            a pipe; or see `open_file_system`.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    if run is not None:
        patterns = [pattern.replace("{run}", RUN_PLACE) for pattern in patterns]
    paths = [
        path for pattern in patterns for part in _split_commas(pattern, str(run)) for path in _expand(part, str(run))
    ]
    by_name: dict[str, str] = {}
    for path in sorted(paths):
        other = by_name.setdefault(shard_name(path), path)
        if other != path:
            raise UserError(
                f"data.shards: {other} and {path} have the same name {shard_name(path)!r}, and outputs are called "
                "after it: rename one, or give each a run of its own"
            )
    return [by_name[name] for name in sorted(by_name)]


def _expand(pattern: str, run: str) -> list[str]:
    """Return the shards that one pattern means."""
    if is_remote(pattern):
        urls = [url.replace(RUN_PLACE, run) for url in expand_braces(pattern)]
        return [path for url in urls for path in match_urls(url)]
    pattern = str(_local(pattern)) if pattern.startswith(("~", "file://")) else pattern
    start, rest = _existing_start(pattern.replace(RUN_PLACE, run))
    return [path for part in expand_braces(rest) for path in _match(start, part)]


def _existing_start(pattern: str) -> tuple[str, str]:
    """Split a pattern behind the longest folder or file at its beginning that exists as it is written."""
    parts = pattern.split("/")
    for length in range(len(parts), 0, -1):
        start = "/".join(parts[:length])
        if start and os.path.lexists(start):
            return start, "/".join(parts[length:])
    return ("/", pattern.lstrip("/")) if pattern.startswith("/") else ("", pattern)


def _match(start: str, rest: str) -> list[str]:
    written = "/".join(filter(None, (start.rstrip("/") if rest else start, rest))) if start != "/" else f"/{rest}"
    path = Path(written)
    if path.is_dir():
        return shards_in(written)
    if path.is_file():
        found = [str(path)]
    elif path.exists():
        raise UserError(f"data.shards: {path} is a stream; members are read by their place, so a shard must be a file")
    elif any(character in rest for character in GLOB):
        matches = [str(match) for match in Path(start or ".").glob(rest)]
        found = [shard for match in matches for shard in (shards_in(match) if Path(match).is_dir() else [match])]
    else:
        found = []
    refuse_images(found)
    if not found:
        raise MissingFileError(f"data.shards: no shard matches {written}")
    return found


def match_urls(url: str) -> list[str]:
    """Return the URLs that a URL or a pattern of them means; raises MissingFileError if a pattern has none."""
    # In a web address `?` begins the query.
    magic = "*[" if url.startswith(("http://", "https://")) else GLOB
    if HUB_DATA_SET.fullmatch(url):
        url += "/"
    if url.endswith("/"):
        found = list_urls(url) or list_urls(f"{url}**/*.parquet")
        if not found:
            raise MissingFileError(
                f"data.shards: no shard matches {url}: it has no tars and no Parquet files; a folder of images is read "
                f"from disk alone, so download it, or make tars of it (`{typed_command('pack')}`) and put them there"
            )
        return found
    # Whether a single remote shard is there is found when it is opened.
    found = list_urls(url) if any(character in url for character in magic) else [url]
    refuse_images(found)
    if not found:
        raise MissingFileError(f"data.shards: no shard matches {url}")
    return found


def select_shards(paths: Sequence[str], patterns: Sequence[str], *, key: str) -> list[str]:
    """Return the paths whose shard name matches one of `patterns` (fnmatch), in the given order.

    Raises:
        UserError: as `select_names`.
    """
    by_name = {shard_name(path): path for path in paths}
    return [by_name[name] for name in select_names(list(by_name), patterns, key=key)]


def select_names(names: Sequence[str], patterns: Sequence[str], *, key: str) -> list[str]:
    """Return the names of shards that match one of `patterns` (fnmatch), in the given order.

    Raises:
        UserError: a pattern matches no shard; names the recipe `key`, the pattern and some of the shards there are.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:3]) or "no shards"
            raise UserError(f"{key}: pattern {pattern!r} matches none of the {len(names)} shards ({some}, ...)")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
