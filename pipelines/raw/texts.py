"""Texts as people have written them: one decoder, and one rule for which member of a sample is its text."""

import codecs
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.raw.images import SampleReject

# The marks of UTF-32 begin with those of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
TEXT_EXTENSIONS = ("txt", "caption", "text")
# Names of a text where a sample has several members, as webdataset's writers and Hugging Face's columns call them. Of
# those that a sample has, the first counts.
TEXT_FIELDS = (
    *("caption", "text", "prompt", "outputs", "output", "alt_text", "alt", "description", "captions", "texts"),
    *("top_caption", "TEXT", "title", "label_text"),
)
FIELD_MEMBERS = tuple(f"{field.lower()}.{extension}" for field in TEXT_FIELDS for extension in TEXT_EXTENSIONS)
PLACE = re.compile(r"(?P<field>.+)\[(?P<place>\d{1,9})\]", re.DOTALL)
TEXT_OF_IMAGE = re.compile(r"(jpe?g|png|webp|avif|gif|bmp|tiff?|jp2|hei[cf]|jxl)\.(txt|caption|text)")
JSON_EXTENSIONS = ("json", "metadata.json", "meta.json", "info.json")
# SA-1B's JSON has masks and no text, and is larger than the image.
MASKS_KEY = re.compile(r"(.*/)?sa_\d+")
NOT_UTF8, NOT_TEXT, CORRUPT_TEXT = "not_utf8", "not_text", "corrupt_alt_text"


def decode_text(data: bytes) -> str:
    """Return the text of a file or field: by its byte-order mark UTF-8, UTF-16 or UTF-32, without one UTF-8.

    Raises:
        UnicodeError: it is none of them. A text that was written in an encoding of Windows is no guess worth making.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    text = data.decode("utf-8")
    if "\0" in text:
        raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "a text has no zero bytes")
    return text


def trimmed(text: str) -> str:
    """Return a text without the white space and the byte-order marks around it."""
    return text.strip().strip("\ufeff").strip()


def decode_caption(data: bytes) -> str:
    """Return a sample's text without the white space and byte-order marks around it.

    Raises:
        SampleReject: `not_utf8`.
    """
    try:
        return trimmed(decode_text(data))
    except UnicodeError as error:
        raise SampleReject(NOT_UTF8, str(error)) from None


def text_members(extensions: Sequence[str], image_extension: str | None) -> list[str]:
    """Return which of a sample's members are its text, the one that counts first.

    `.txt`, `.caption` or `.text`; else what is called after the image (`jpg.txt`); else a field such as `caption.txt`.
    """
    plain = [extension for extension in TEXT_EXTENSIONS if extension in extensions]
    if "." not in "".join(extensions):
        return plain
    if image_extension is None:  # of texts that are alone in their tar or folder
        beside = [extension for extension in extensions if TEXT_OF_IMAGE.fullmatch(extension)]
    else:
        beside = [f"{image_extension}.{extension}" for extension in TEXT_EXTENSIONS]
    return [*plain, *(name for name in (*beside, *FIELD_MEMBERS) if name in extensions)]


def json_members(key: str, extensions: Iterable[str]) -> list[str]:
    """Return which of a sample's members are JSON that may hold its text."""
    return [] if MASKS_KEY.fullmatch(key) else [name for name in JSON_EXTENSIONS if name in extensions]


def read_json_record(data: bytes) -> dict[str, Any]:
    """Return the object of a sample's JSON; what is no object is an empty one.

    Raises:
        SampleReject: `corrupt_alt_text`: it is no JSON, or nested too deeply.
    """
    try:
        record = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise SampleReject(CORRUPT_TEXT, str(error)) from None
    return record if isinstance(record, dict) else {}


def text_of_value(value: Any, place: int | None = None) -> str | None:
    """Return a cell of a table, or a value of JSON, as a text without the white space around it.

    Of a list it is the text at `place`, without that the first one that is not blank.

    Raises:
        SampleReject: `not_utf8`, or `not_text`: it is a number, an object or the like.
    """
    if isinstance(value, list | tuple):
        if place is not None:
            return text_of_value(value[place]) if place < len(value) else None
        return first_text(value)
    if place or value is None or (isinstance(value, float) and math.isnan(value)):  # as pandas writes what is missing
        return None
    if isinstance(value, bytes):
        return decode_caption(value)
    if not isinstance(value, str):
        raise SampleReject(NOT_TEXT, type(value).__name__)
    if "\0" in value or not value.isascii():
        try:
            decode_text(value.encode("utf-8"))  # JSON can hold half of a surrogate pair
        except UnicodeError as error:
            raise SampleReject(NOT_UTF8, str(error)) from None
    return trimmed(value)


def first_text(values: Iterable[Any]) -> str | None:
    """Return the first text that is not blank; else an empty one if some are, or None; raises as `text_of_value`."""
    blank = reject = None
    for value in values:
        try:
            text = text_of_value(value)
        except SampleReject as error:
            if error.reason != NOT_TEXT:
                raise
            reject = reject or error
            continue
        if text:
            return text
        blank = blank if text is None else text
    if reject is not None:
        raise reject
    return blank


def split_place(name: str) -> tuple[str, int | None]:
    """Return which field, and which text of its list, a name means: `captions[1]` is the second of `captions`."""
    found = PLACE.fullmatch(name)
    return (found["field"], int(found["place"])) if found else (name, None)


def field_of(record: dict[str, Any], name: str) -> Any:
    """Return the field `name` of an object, or `a.b`: the field b of the object a; None where there is none."""
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    found = record.get(outer)
    return found.get(inner) if isinstance(found, dict) else None


def text_of_record(record: dict[str, Any], name: str | None = None) -> str | None:
    """Return the text of a sample's JSON: the field `name`, or the first of `TEXT_FIELDS`, in any case, that has one.

    Where all are blank it is empty. Of a list it is the text that `name` says, see `split_place` and `text_of_value`.

    Raises:
        SampleReject: as `text_of_value`.
    """
    if name is not None:
        field, place = split_place(name)
        return text_of_value(field_of(record, field), place)
    in_any_case = {field.lower(): field for field in reversed(record)}
    return first_text(
        record.get(field if field in record else in_any_case.get(field.lower(), field)) for field in TEXT_FIELDS
    )
