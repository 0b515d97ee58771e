"""Which files a caption set consists of, and which of their rows are read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset_stats.captions import ADDRESS_SEPARATOR, Address, RowSample, count_rows, readable, text_files
from dataset_stats.config import CaptionSet
from errors import UserError
from pipelines.engine.pieces import Source
from pipelines.raw.patterns import expand_braces, expand_shards, select_shards, shard_name
from pipelines.raw.shards import describe_shards
from pipelines.store.files import is_remote, open_ranges, sha256_text
from pipelines.store.manifest import Manifest

MAX_DRAWN_FROM = 10**9 - 1  # samples; of NumPy's multivariate_hypergeometric


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run offers to its caption sets.

    Attributes:
        captions: manifest of RUN/captions, where a set of that layout needs it.
        captions_folder: RUN/captions.
        raw_shards: paths of data.shards.
    """

    captions: Manifest | None
    captions_folder: Path
    raw_shards: Sequence[str]


def caption_sources(name: str, caption_set: CaptionSet, *, inputs: RunFiles) -> list[Source]:
    """Sources of the caption set `name`.

    Raises:
        UserError: a pattern matches nothing, `files` is missing, or the set has no rows; names the set and its files.
    """
    key = f"dataset_stats.sets.{name}"
    if caption_set.layout == "captions":
        sources = _pipeline_sources(key, caption_set, inputs)
    elif caption_set.layout == "raw":
        sources = _raw_sources(key, caption_set, inputs)
    elif caption_set.files:
        paths = _expand_files(key, caption_set)
        sources = [
            _file_source(Address(layout=caption_set.layout, column=caption_set.column, path=path)) for path in paths
        ]
    else:
        raise UserError(f'{key}.files is missing; layout "{caption_set.layout}" needs it')
    if not sum(source.num_samples for source in sources):
        files = ", ".join(Address.parse(source.path).path for source in sources[:3])
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        raise UserError(f"{key} is empty: no samples in {files}{more}")
    return sources


def sample_sources(sources: Sequence[Source], num_rows: int, *, seed: int) -> list[Source]:
    """The same sources, cut down to `num_rows` rows drawn from all of their rows alike, without replacement.

    The draw depends on the seed, on the number of rows of each source and on the sources' shard names only. Sets over
    the same shards, such as alt texts and captions of the same images, are therefore drawn at the same rows.

    Raises:
        UserError: there are too many rows to draw from.
    """
    sizes = [source.num_samples for source in sources]
    if num_rows >= sum(sizes):
        shares = sizes
    elif sum(sizes) > MAX_DRAWN_FROM:
        raise UserError(
            f"dataset_stats.sample: a set of {sum(sizes):,} samples is more than can be drawn from "
            f"({MAX_DRAWN_FROM:,}); name fewer of its shards or files"
        )
    else:
        rng = np.random.default_rng(seed)
        shares = rng.multivariate_hypergeometric(sizes, num_rows, method="marginals").tolist()
    sampled = []
    for source, num_chosen in zip(sources, shares, strict=True):
        if not num_chosen:
            continue
        address = Address.parse(source.path)
        # Without the shard's name, shards of one size would all be drawn at the same rows.
        seeds = (seed, zlib.crc32(shard_name(address.path).encode()))
        sample = RowSample(num_rows=source.num_samples, num_chosen=num_chosen, seeds=seeds)
        name = f"{source.name}.{num_chosen}-of-{source.num_samples}-seed-{seed}"
        sampled.append(
            replace(source, name=name, path=str(replace(address, sample=sample)), num_samples=int(num_chosen))
        )
    return sampled


def _pipeline_sources(key: str, caption_set: CaptionSet, inputs: RunFiles) -> list[Source]:
    captions, column = inputs.captions, caption_set.column
    assert captions is not None, "the captions layout needs the captions manifest"
    shards = select_shards(sorted(captions.shards), caption_set.shards, key=f"{key}.shards")
    return [
        Source(
            name=f"{shard}.{column}",
            path=str(Address(layout="captions", column=column, path=str(inputs.captions_folder / f"{shard}.parquet"))),
            identity=captions.shards[shard].files[".parquet"],
            num_samples=captions.shards[shard].num_read,
        )
        for shard in shards
    ]


def _raw_sources(key: str, caption_set: CaptionSet, inputs: RunFiles) -> list[Source]:
    paths = select_shards(inputs.raw_shards, caption_set.shards, key=f"{key}.shards")
    addresses = [Address(layout="raw", column=caption_set.column, path=path) for path in paths]
    described = describe_shards(paths, run=inputs.captions_folder.parent)
    return [
        replace(shard.source, name=_source_name(address), path=str(address))
        for address, shard in zip(addresses, described, strict=True)
    ]


def _expand_files(key: str, caption_set: CaptionSet) -> list[str]:
    patterns = [caption_set.files] if isinstance(caption_set.files, str) else caption_set.files
    expanded = [path for pattern in patterns for path in expand_braces(pattern)]
    folders = [path for path in expanded if not is_remote(path) and Path(path).is_dir()]
    others = [path for path in expanded if path not in folders]
    found = []
    for folder in folders:
        if caption_set.layout != "text":
            others.append(f"{folder}/*.{caption_set.layout}")
        elif texts := text_files(folder):
            _require_no_tars(key, folder, texts[0])
            found.append(folder)
        else:
            others.append(folder)  # a folder of tars
    try:
        return found + (expand_shards(others) if others else [])
    except UserError as error:
        raise UserError(f"{key}.files: {str(error).removeprefix('data.shards: ')}") from None


def _require_no_tars(key: str, folder: str, text: Path) -> None:
    if tar := next(Path(folder).glob("*.tar"), None):
        raise UserError(
            f"{key}.files: {folder} holds tars ({tar.name}) as well as texts ({readable(text.relative_to(folder))}); "
            f"name the tars ({folder}/*.tar) or a folder that has only the texts"
        )


def _file_source(address: Address) -> Source:
    path = address.path
    if ADDRESS_SEPARATOR in address.column:
        raise UserError(f"{path}: a column name with {ADDRESS_SEPARATOR!r} cannot be read: {address.column!r}")
    if is_remote(path):
        with open_ranges(path) as file:
            identity = file.stamp or str(file.size)
    elif Path(path).is_dir():
        stats = [(readable(file.name), file.stat()) for file in text_files(path)]
        identity = sha256_text("".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}\n" for name, stat in stats))
    else:
        identity = f"{Path(path).stat().st_size}:{Path(path).stat().st_mtime_ns}"
    return Source(name=_source_name(address), path=str(address), identity=identity, num_samples=count_rows(address))


def _source_name(address: Address) -> str:
    name = Path(shard_name(address.path)).stem
    return f"{name}-{sha256_text(address.path)[:8]}.{address.layout}-{address.column}"
