"""A folder of images as a raw shard: at any depth, with texts beside them or in `metadata.*` as Hugging Face has it."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from pipelines.raw.kinds.local_files import FileFacts, identify_files, list_folder
from pipelines.raw.kinds.tar_headers import TarEntry
from pipelines.raw.reading import Reading, UnreadableShardError
from pipelines.raw.samples import GroupedSamples, RawSample, group_files, is_stray, readable_name, split_at_extension
from pipelines.raw.shard_headers import ShardHeaders, ShardSummary, count_rejects, count_unknown_texts, has_text
from pipelines.raw.shard_names import is_image_name
from pipelines.raw.tables.open_table import open_table, require_sound
from pipelines.raw.tables.row_texts import RowTexts
from pipelines.raw.tables.rows import key_of_cell, local_name
from pipelines.raw.tasks import no_garbage

METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMN = "file_name"
MISSING_IMAGE_FILE, NOT_IN_METADATA, DUPLICATE_ROW = "missing_image_file", "not_in_metadata", "duplicate_row"


@no_garbage()
def read_folder(path: str, reading: Reading) -> ShardHeaders:
    """Find the samples of a folder: one for each image, and one for each that its metadata names and it lacks.

    Faulty samples carry a reason, as in `group_files`, and `missing_image_file`, `not_in_metadata` or `duplicate_row`
    where metadata tell of other images than there are.

    Raises:
        UnreadableShardError: there is no image in it.
        UserError: it cannot be read, or its metadata cannot.
    """
    contents = list_folder(path)
    images = _image_files(contents.files)
    if not images:
        raise UnreadableShardError(f"{path} has no image: {len(contents.files):,} files, and none is called as one")
    tables = metadata_tables(contents.files)
    rows = [row for table in tables for row in _rows_of(path, table, images, reading)]
    del images  # of a million files each list counts
    grouped = _group_all(contents.files, {*tables}, rows)
    samples = grouped.samples
    texts = RowTexts([f"{path}/{table}" for table in tables]) if tables else None
    if texts is not None:
        samples = _join_rows(tables, rows, samples, contents.files)
    summary = ShardSummary(
        kind="folder",
        stamp=contents.stamp,
        image_column=reading.image_column,
        identity=identify_files(path, contents.files, tables=tables),
        rejects=count_rejects(samples),
        num_samples=len(samples),
        num_texts=sum(map(has_text, samples)) if texts is None or not texts.text_columns else len(samples),
        has_labels=any("cls" in sample.members for sample in samples) or (texts is not None and texts.has_labels()),
        unusable=contents.unusable,
        unknown_texts=count_unknown_texts(samples),
        strays=[*contents.hidden, *grouped.strays],
    )
    return ShardHeaders(summary=summary, samples=samples, files=contents.files, tables=tables)


def _group_all(files: Sequence[FileFacts], tables: Collection[str], rows: Sequence["_MetadataRow"]) -> GroupedSamples:
    entries = [
        TarEntry(facts.name, "file", number, facts.size, 0)
        for number, facts in enumerate(files)
        if facts.name not in tables
    ]
    return group_files(entries, named={row.file for row in rows if row.file})


def metadata_tables(files: Sequence[FileFacts]) -> list[str]:
    """Return which files are tables that tell of images, as Hugging Face's ImageFolder has them."""
    return [facts.name for facts in files if facts.name.rpartition("/")[2].lower() in METADATA_NAMES]


class _MetadataRow(NamedTuple):
    """A row of metadata: the path of its image below the shard's folder, and the file that this is, or None."""

    image: str
    file: str | None


def _image_files(files: Sequence[FileFacts]) -> dict[str, str | None]:
    """Return files that are called as images by readable name, and by that in lower case, None if several have it."""
    names = [facts.name for facts in files if is_image_name(facts.name) and not is_stray(facts.name)]
    found: dict[str, str | None] = {readable_name(name): name for name in names}
    others: dict[str, str | None] = {}
    for name in names:
        lower = _lower_extension(name)
        if lower not in found:
            others[lower] = None if lower in others else name
    return found | others if others else found


def _rows_of(path: str, table: str, images: Mapping[str, str | None], reading: Reading) -> list[_MetadataRow]:
    """Find the images that a table of metadata names; raises `UserError`."""
    folder = table.rpartition("/")[0]
    root = f"{Path(path).absolute()}/"
    rows = []
    for name in map(local_name, _names_in(f"{path}/{table}", reading)):
        image, file = "", None
        for spelled in (name, name.replace("\\", "/")):  # the second as Windows has it
            if spelled.startswith(root):
                image = spelled.removeprefix(root)
            else:
                image = f"{folder}/{spelled}" if folder else spelled
            if image not in images:
                image = os.path.normpath(image) if spelled else ""
            file = images[image] if image in images else images.get(_lower_extension(image))
            if file is not None:
                image = file
                break
        rows.append(_MetadataRow(image, file))
    return rows


def _join_rows(
    tables: Sequence[str], rows: Sequence[_MetadataRow], samples: list[RawSample], files: Sequence[FileFacts]
) -> list[RawSample]:
    """Give each sample the row that names its image, and each row a sample."""
    by_file = {
        files[sample.members[sample.image_extension].offset].name: sample
        for sample in samples
        if sample.image_extension is not None
    }
    missing: list[RawSample] = []
    for number, row in enumerate(rows):
        sample = by_file.get(row.file) if row.file is not None else None
        if sample is None:
            key = _missing_key(row.image) or f"metadata_{number:08d}"
            missing.append(RawSample(key, reject=MISSING_IMAGE_FILE, row=number))
        elif sample.row is not None:
            sample.reject = sample.reject or DUPLICATE_ROW
        else:
            sample.row = number
    folders = tuple(table.rpartition("/")[0] for table in tables)
    for sample in by_file.values():
        is_governed = any(not folder or sample.key.startswith(f"{folder}/") for folder in folders)
        if sample.row is None and is_governed:
            sample.reject = sample.reject or NOT_IN_METADATA
    keys = {sample.key for sample in samples}
    for sample in missing:
        while sample.key in keys:
            sample.key += "_"
        keys.add(sample.key)
    return [*samples, *missing]


def _lower_extension(name: str) -> str:
    key, extension = split_at_extension(name)
    if name.isascii() and extension and extension.islower():
        return name
    return f"{readable_name(key)}.{extension.lower()}"


def _missing_key(image: str) -> str:
    return "" if image.startswith(("/", "..")) else split_at_extension(image)[0]


def _names_in(table: str, reading: Reading) -> list[str]:
    """Return the image's name in each row of a table of metadata, empty where a row has none."""
    with open_table(table) as opened:
        require_sound(opened)
    texts = RowTexts([table])
    column = name_column(texts.columns, reading, where=table)
    return [key_of_cell(cell).strip() if isinstance(cell, str | bytes) else "" for cell in texts.column(column)]


def name_column(columns: Sequence[str], reading: Reading, *, where: str) -> str:
    """Return which column of metadata names the image: `file_name`, or one that ends so.

    Raises:
        UserError: none, or several do; names them.
    """
    if reading.image_column in columns:
        assert reading.image_column is not None
        return reading.image_column
    if NAME_COLUMN in columns:
        return NAME_COLUMN
    found = [column for column in columns if column.endswith(f"_{NAME_COLUMN}")]
    if len(found) > 1 and f"image_{NAME_COLUMN}" in found:
        found = [f"image_{NAME_COLUMN}"]
    if len(found) != 1:
        which = ", ".join(found) if found else f"none of {', '.join(columns)}"
        raise UserError(f"{where}: which column names the images? {which}; say it with data.image_column")
    return found[0]


def classes_of(samples: Sequence[RawSample]) -> dict[str, int]:
    """Number the folders in which the samples are, in the order of their names, as torchvision's ImageFolder does."""
    names = {sample.key.partition("/")[0] for sample in samples if "/" in sample.key}
    return {name: number for number, name in enumerate(sorted(names))}


def is_local_folder(path: str) -> bool:
    """Whether a path is that of a folder here."""
    path = path.removeprefix("file://")
    return "://" not in path and os.path.isdir(path)  # noqa: PTH112 (asked of each of many shards)
