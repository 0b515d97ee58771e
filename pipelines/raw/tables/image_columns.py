"""Which column of a table has the images, as bytes, or names their files."""

import contextlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.raw.reading import Reading
from pipelines.raw.samples import IMAGE_EXTENSIONS
from pipelines.raw.tables.column_names import PATH_NAMES, TEXT_NAMES, URL_NAMES, known_column

IMAGE_COLUMN = "data.image_column"
# Of several columns with bytes the first of these is the image.
IMAGE_NAMES = ("image", "img", "picture", "photo", "image_bytes", "img_bytes", "bytes", "content", "binary", "data")
IMAGE_NAMES += tuple(sorted(IMAGE_EXTENSIONS))


class ImageColumn(NamedTuple):
    """A column with the bytes of images: binary, or if `is_struct` with fields `bytes` and, perhaps, `path`."""

    name: str
    is_struct: bool
    has_path: bool


def image_column(schema: pa.Schema, reading: Reading, *, where: str) -> ImageColumn | None:
    """Return the column with the bytes of images, or None if no column has bytes: it may have paths.

    It is the one that `data.image_column` names or Hugging Face's features call an image; else the only one with a
    field of bytes; else of those with bytes the first of `IMAGE_NAMES`, or the only one.

    Raises:
        UserError: several may be meant, the one that is named is not there, or a column has lists of images; names
            the columns and the key.
    """
    found = {field.name: column for field in schema if (column := _column(field)) is not None}
    if reading.image_column is not None:
        name = reading.image_column.removesuffix(".bytes")
        if name not in schema.names and (inner := _inner_field(schema, name)) is not None:
            if _column(inner) is None:
                return None  # it may have paths
            raise UserError(
                f"{where}: {IMAGE_COLUMN} = {name!r} has images inside of a column: write them as a column of its own"
            )
        if name not in schema.names:
            raise UserError(f"{where}: {IMAGE_COLUMN} = {name!r} is no column; columns are {', '.join(schema.names)}")
        return found.get(name)
    declared = [name for name in _declared_images(schema) if name in found]
    structs = [name for name, column in found.items() if column.is_struct]
    for names in (declared, structs, list(found)):
        if len(names) == 1:
            return found[names[0]]
        if names:
            by_name = [name for known in IMAGE_NAMES for name in names if name.lower() == known]
            if not by_name:
                raise UserError(
                    f"{where}: which of the columns {', '.join(names)} has the images? Say it with {IMAGE_COLUMN}"
                )
            return found[by_name[0]]
    for field in schema:
        if field.name.lower().removesuffix("s") in IMAGE_NAMES and _is_list_of_images(field.type):
            raise UserError(
                f"{where}: column {field.name!r} has lists of images ({field.type}), and a row is one image: write a "
                "row for each"
            )
    return None


def _inner_field(schema: pa.Schema, name: str) -> pa.Field | None:
    """Return the field b of the column a, for `a.b`, or None."""
    outer, _, inner = name.partition(".")
    if outer not in schema.names or not pa.types.is_struct(kind := schema.field(outer).type):
        return None
    return next((field for field in kind if field.name == inner), None)


def _is_list_of_images(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and _column(pa.field("", kind.value_type)) is not None


def _column(field: pa.Field) -> ImageColumn | None:
    if pa.types.is_struct(field.type):
        names = {inner.name: inner.type for inner in field.type}
        if "bytes" in names and _is_binary(names["bytes"]):
            return ImageColumn(field.name, is_struct=True, has_path="path" in names)
        return None
    return ImageColumn(field.name, is_struct=False, has_path=False) if _is_binary(field.type) else None


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _declared_images(schema: pa.Schema) -> list[str]:
    """Return the columns that `datasets` has noted as images in a file."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    return []


def path_column(columns: Sequence[str], reading: Reading, *, where: str) -> str:
    """Return the column that names image files; raises `UserError` if none, or several, may be meant."""
    if reading.image_column is not None:
        if reading.image_column not in columns:
            raise UserError(
                f"{where}: {IMAGE_COLUMN} = {reading.image_column!r} is no column; columns are {', '.join(columns)}"
            )
        return reading.image_column
    # Of an object of JSON by path the path is called the key.
    if (known := known_column((*PATH_NAMES, "key"), columns)) is not None:
        return known
    named = [column for column in columns if column.endswith("_file_name")]
    if len(named) == 1:
        return named[0]
    if (addresses := known_column(URL_NAMES, columns)) is not None:
        raise UserError(
            f"{where} has addresses ({addresses}) and no images: download them first, as img2dataset does, and name "
            "its tars"
        )
    raise UserError(
        f"{where}: no column is known to have images or their paths; columns are {', '.join(columns) or 'none'}; say "
        f"which with {IMAGE_COLUMN}{where_captions_go(where, columns)}"
    )


def where_captions_go(path: str, columns: Sequence[str]) -> str:
    """Say what to type of a table that has texts and, it seems, no images; nothing of one without texts."""
    text = known_column(TEXT_NAMES, columns)
    if text is None:
        return ""
    measure = typed_command("stats", {"sets": f"mine={path}#{text}"})
    return (
        f"; captions of other samples are typed as captioning.engine=given captioning.table={path}, and captions alone "
        f"are measured by `{measure}`"
    )
