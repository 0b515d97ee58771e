"""Which files a caption set consists of, and which of their rows are read."""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from dataset_stats.captions import (
    ADDRESS_SEPARATOR,
    PIPELINE_COLUMN,
    Address,
    RawOpening,
    RowSample,
    count_rows,
    is_folder,
    log,
)
from dataset_stats.config import CaptionSet
from errors import UserError
from pipelines.columns.caption_columns import captions_folder
from pipelines.engine.pieces import Source
from pipelines.raw.caption_files import (
    TARS,
    captions_in_folder,
    choose_text_column,
    find_files,
    kind_of_file,
    text_files,
)
from pipelines.raw.patterns import select_names, select_shards
from pipelines.raw.reading import AS_IT_COMES
from pipelines.raw.shard_names import is_image_name, shard_name
from pipelines.raw.shards import describe_shards
from pipelines.raw.tables.open_table import TableFormat, open_table, require_sound, table_format
from pipelines.raw.tables.rows import key_of_cell
from pipelines.store.files import is_remote, open_ranges, sha256_text
from pipelines.store.manifest import Manifest, read_manifest

# A set of more files of texts than this is one of a file a caption, as people name with `*.txt`.
MAX_LINE_FILES = 100
MAX_DRAWN_FROM = 10**9 - 1  # samples; of NumPy's multivariate_hypergeometric


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run offers to its caption sets.

    Attributes:
        run: its folder.
        captions: manifest of RUN/captions, where a set of that layout needs it.
        raw_shards: paths of data.shards.
        opening: of those.
    """

    run: Path
    captions: Manifest | None
    raw_shards: Sequence[str]
    opening: RawOpening


def caption_sources(name: str, caption_set: CaptionSet, *, inputs: RunFiles) -> list[Source]:
    """Sources of the caption set `name`.

    Raises:
        UserError: a pattern matches nothing, `files` is missing, or the set has no rows; names the set and its files.
    """
    key = f"dataset_stats.sets.{name}"
    if caption_set.reads_captions:
        sources = _pipeline_sources(key, caption_set, inputs)
    elif caption_set.layout == "raw":
        sources = _raw_sources(key, caption_set, inputs)
    elif caption_set.files:
        sources = _file_sources(key, caption_set, inputs.opening)
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
        seeds = (seed, zlib.crc32(address.shard.encode()))
        sample = RowSample(num_rows=source.num_samples, num_chosen=num_chosen, seeds=seeds)
        name = f"{source.name}.{num_chosen}-of-{source.num_samples}-seed-{seed}"
        sampled.append(
            replace(source, name=name, path=str(replace(address, sample=sample)), num_samples=int(num_chosen))
        )
    return sampled


def _pipeline_sources(key: str, caption_set: CaptionSet, inputs: RunFiles) -> list[Source]:
    name = caption_set.column or PIPELINE_COLUMN
    folder, column, captions = captions_folder(inputs.run), name, inputs.captions
    if (of_pass := captions_folder(inputs.run, name)).is_dir():
        folder, column, captions = of_pass, PIPELINE_COLUMN, read_manifest(of_pass)
    assert captions is not None, "the captions layout needs the captions manifest"
    shards = select_names(sorted(captions.shards), caption_set.shards, key=f"{key}.shards")
    return [
        Source(
            name=f"{shard}.{name}",
            path=str(Address(layout="captions", column=column, path=str(folder / f"{shard}.parquet"))),
            identity=captions.shards[shard].files[".parquet"],
            num_samples=captions.shards[shard].num_read,
        )
        for shard in shards
    ]


def _raw_sources(key: str, caption_set: CaptionSet, inputs: RunFiles) -> list[Source]:
    paths = select_shards(inputs.raw_shards, caption_set.shards, key=f"{key}.shards")
    return _sources_of_raw(paths, caption_set.column, inputs.opening)


def _sources_of_raw(paths: Sequence[str], column: str, opening: RawOpening) -> list[Source]:
    addresses = [Address(layout="raw", column=column, path=path) for path in paths]
    reading = opening.reading
    described = describe_shards(paths, reading, run=opening.run)
    # Which text is the sample's own is no part of a shard's identity.
    texts = "" if reading == AS_IT_COMES or column else f" {reading.dialect} {reading.text_column}"
    return [
        replace(shard.source, name=_source_name(address), path=str(address), identity=f"{shard.source.identity}{texts}")
        for address, shard in zip(addresses, described, strict=True)
    ]


def _file_sources(key: str, caption_set: CaptionSet, opening: RawOpening) -> list[Source]:
    """Sources of files; the column is chosen once, so that no file's texts are taken from another one."""
    column = caption_set.column
    sources = []
    for layout, path in _find_files(key, caption_set):
        if layout == "raw":
            sources += _sources_of_raw([path], column, opening)
            continue
        if layout != "text" and not any(Address.parse(source.path).column for source in sources):
            column = _look_at_column(f"{key}.column", column, layout, path)
        address = Address(layout=layout, column="" if layout == "text" else column, path=path)
        sources.append(_file_source(f"{key}.files", address))
    return sources


def _find_files(key: str, caption_set: CaptionSet) -> list[tuple[str, str]]:
    """Layout and path of all files and folders of a set, in order, each once."""
    patterns = [caption_set.files] if isinstance(caption_set.files, str) else caption_set.files
    found = []
    for pattern in patterns:
        paths = find_files(f"{key}.files", pattern)
        lines = [path for path in paths if not is_folder(path) and table_format(path) == "lines"]
        if caption_set.layout == "auto" and len(lines) > MAX_LINE_FILES:
            raise UserError(
                f"{key}.files: {pattern} is {len(lines):,} files of texts; where each is one caption, name their "
                'folder, and where each has a caption a line, say layout = "lines"'
            )
        for path in paths:
            found += (
                _captions_in_folder(key, caption_set, path)
                if is_folder(path)
                else [(_layout(key, caption_set, path), path)]
            )
    return list(dict.fromkeys(found))


def _captions_in_folder(key: str, caption_set: CaptionSet, folder: str) -> list[tuple[str, str]]:
    """Layout and path of what a folder holds; of texts beside images, the images count, those without a text too."""
    found = captions_in_folder(f"{key}.files", folder, layout=caption_set.layout)
    is_of_images = caption_set.layout == "auto" and found == [("text", folder)] and _has_images(folder)
    return [("raw", folder)] if is_of_images else found


def _has_images(folder: str) -> bool:
    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def _layout(key: str, caption_set: CaptionSet, path: str) -> str:
    """What a file is: what the recipe says, or its name."""
    if caption_set.layout == "text" and table_format(path):
        raise UserError(f'{key}.files: {path} is no tar; of layout "text", name tars or the folder that has the texts')
    if caption_set.layout != "auto":
        return caption_set.layout
    try:
        kind = kind_of_file(path)
    except UserError as error:
        raise UserError(f"{key}.files: {error}") from None
    return "text" if kind == TARS else kind


def _look_at_column(key: str, column: str, layout: str, path: str) -> str:
    """The column of the texts, where the recipe names none known by its own name; says which, and that it has lists."""
    with open_table(path, cast(TableFormat, layout)) as table:
        if not column and table.columns:
            try:
                column = choose_text_column(path, table.columns)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
            log.info(f"{key} = {column!r}")
        if column in table.columns and any(
            isinstance(row.values[column], list) for row in table.rows(range(1), [column])
        ):
            log.warning(f"{path}: column {column!r} holds lists of texts; of each, the first that is not blank counts")
    return column


def _file_source(key: str, address: Address) -> Source:
    path = address.path
    if ADDRESS_SEPARATOR in address.column:
        raise UserError(f"{path}: a column name with {ADDRESS_SEPARATOR!r} cannot be read: {address.column!r}")
    if is_remote(path):
        with open_ranges(path) as file:
            identity = file.stamp or str(file.size)
    elif Path(path).is_dir():
        files = itertools.chain.from_iterable(text_files(path).values())
        stats = [(key_of_cell(str(file)), file.stat()) for file in files]
        identity = sha256_text("".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}\n" for name, stat in stats))
    else:
        identity = f"{Path(path).stat().st_size}:{Path(path).stat().st_mtime_ns}"
    if address.layout != "text":
        with open_table(path, cast(TableFormat, address.layout)) as table:
            require_sound(table)
    num_samples = count_rows(address)
    if address.layout == "text" and not is_folder(path):
        identity = f"{identity}:{num_samples}"  # images without a text did not count once
    return Source(name=_source_name(address), path=str(address), identity=identity, num_samples=num_samples)


def _source_name(address: Address) -> str:
    name = Path(shard_name(address.path)).stem
    column = re.sub(r"[^\w.-]", "_", address.column)  # it is part of a file's name
    place = address.path if column == address.column else f"{address.path}{ADDRESS_SEPARATOR}{address.column}"
    return f"{name}-{sha256_text(place)[:8]}.{address.layout}{column and f'-{column}'}"
