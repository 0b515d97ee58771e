"""What people call the columns of keys, images and texts: one list each, and found in any case."""

from collections.abc import Sequence

from pipelines.raw.texts import TEXT_FIELDS

# The key of a row: a row without one, or two rows with the same, are at fault.
KEY_NAMES = ("key", "__key__")
# The file of an image, the likeliest first.
PATH_NAMES = ("file_name", "image_file_name", "image_path", "img_path", "image_file", "path", "file_path", "filepath")
PATH_NAMES += ("filename", "file", "image.path", "image", "img")
URL_NAMES = ("url", "image_url", "img_url", "__url__")
# Names of an image, which are keys if each row has its own.
# An `id` may be that of the row, as of COCO's annotations, so it is the last.
ID_NAMES = ("image_id", "sample_id", "uid", "uuid", "id")
# Of which sample a row of captions is.
SAMPLE_NAMES = (*KEY_NAMES, *PATH_NAMES, *ID_NAMES)
# Texts, also as webdataset's members are called where they have become columns.
TEXT_NAMES = (*TEXT_FIELDS, "txt", *(f"json.{field}" for field in TEXT_FIELDS))


def known_columns(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns that are called by one of `names`, in any case, in the order of `names`."""
    found = {column.lower(): column for column in reversed(columns)} | {column: column for column in columns}
    spelled = (spelling for name in names for spelling in (name, name.lower()))
    return list(dict.fromkeys(found[name] for name in spelled if name in found))


def known_column(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the first of `known_columns`, or None."""
    return next(iter(known_columns(names, columns)), None)
