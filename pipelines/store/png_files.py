"""Whether a PNG file is whole: by its structure, which finds every cut at little cost, and by all of its bytes."""

import os
import zlib
from pathlib import Path

from PIL import Image

from errors import MissingFileError, UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# Length and type before a chunk's content, CRC-32 behind it.
HEAD_BYTES, CRC_BYTES = 8, 4
# What Pillow raises for damage, depending on where it is.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, zlib.error)


def missing_of_png(path: Path) -> str | None:
    """Return why a file is no whole PNG, or None: its chunks follow each other up to the last, and nothing is behind.

    Some thirty reads of a few bytes for an image of 1024 pixels; what its pixels are is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _missing(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _missing(descriptor: int, size: int) -> str | None:
    if size == 0:
        return "it is empty"
    if os.pread(descriptor, len(SIGNATURE), 0) != SIGNATURE:
        return "it does not begin as a PNG does"
    position = len(SIGNATURE)
    while position < size:
        head = os.pread(descriptor, len(END), position)
        if head == END:
            behind = size - position - len(END)
            return f"{behind:,} bytes lie behind its end" if behind else None
        if len(head) < HEAD_BYTES or not head[4:HEAD_BYTES].isalpha():
            break
        position += HEAD_BYTES + int.from_bytes(head[:4]) + CRC_BYTES
    return f"it is cut short or overwritten: of its {size:,} bytes the last are not a PNG's end"


def change_of_png(path: Path) -> str | None:
    """Return why a PNG file is not as it was written, or None: as `missing_of_png`, then the CRC-32 of each chunk.

    Pillow compares none of those around pixels, and decodes changed ones without a word.
    """
    if (missing := missing_of_png(path)) is not None:
        return missing
    data = path.read_bytes()
    position = len(SIGNATURE)
    while position < len(data):
        length, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + HEAD_BYTES]
        end = position + HEAD_BYTES + length
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + CRC_BYTES]):
            return f"bytes of its chunk {name.decode()} at {position:,} have changed (CRC-32)"
        position = end + CRC_BYTES
    return None


def damage_of_png(path: Path) -> str | None:
    """Return what is wrong with a PNG file, or None: as `change_of_png`, then all of its pixels."""
    if (change := change_of_png(path)) is not None:
        return change
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except DAMAGE as error:
        return f"it cannot be decoded ({error})"
    return None


def read_picture(path: Path, *, mend: str) -> Image.Image:
    """Return the pixels of a PNG file in RGB; `mend` says what to do when they cannot be had.

    Raises: see `require_sound_png`.
    """
    require_sound_png(path, mend=mend)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read as an image: {error}; {mend}") from None


def require_sound_png(path: Path, *, mend: str) -> None:
    """Check that a PNG file is as it was written; `mend` says what to do when it is not.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no PNG, or one that is cut or changed; names it.
    """
    try:
        change = change_of_png(path)
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; {mend}") from None
    if change is not None:
        raise UserError(f"{path} cannot be read as an image: {change}; {mend}")
