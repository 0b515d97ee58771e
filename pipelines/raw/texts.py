"""Texts as people have written them: one decoder, and one rule for which member of a sample is its text."""

import codecs
import json
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
NOT_UTF8, CORRUPT_TEXT = "not_utf8", "corrupt_alt_text"


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


def decode_caption(data: bytes) -> str:
    """Return a sample's text without the white space around it.

    Raises:
        SampleReject: `not_utf8`.
    """
    try:
        return decode_text(data).strip()
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


def split_place(name: str) -> tuple[str, int]:
    """Return which field, and which text of its list, a name means: `captions[1]` is the second of `captions`."""
    found = PLACE.fullmatch(name)
    return (found["field"], int(found["place"])) if found else (name, 0)


def text_of_record(record: dict[str, Any], name: str | None = None) -> str | None:
    """Return the text of a sample's JSON: the field `name`, or the first of `TEXT_FIELDS` that it has.

    Of a list of texts it is the first one, or that which `name` says, see `split_place`. Where all are blank it is
    empty. Half a surrogate pair becomes `?`: the text is valid UTF-8.
    """
    blank = None
    for wanted in (name,) if name is not None else TEXT_FIELDS:
        field, place = split_place(wanted)
        found = record.get(field)
        if isinstance(found, list):
            found = found[place] if place < len(found) else None
        if isinstance(found, str):
            if found.strip():
                return found.encode("utf-8", errors="replace").decode()
            blank = ""
    return blank
