"""What a PNG says besides its pixels, read with bounds, and the same PNG without it.

Texts of any size, unknown chunks and damaged ones cost no picture: the decoder sees none of them.
"""

import math
import struct
import zlib
from dataclasses import dataclass

from pipelines.raw.pictures.icc import MAX_PROFILE_BYTES, PRIMARIES, TRANSFERS, matrix_profile, whole_profile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEAD_BYTES, CRC_BYTES = 8, 4
GREY, TRUECOLOUR = 0, 2  # colour types in which tRNS is a key
NUM_CHANNELS = {GREY: 1, TRUECOLOUR: 3, 3: 1, 4: 2, 6: 4}
# First row, rows down, first column, columns across of each pass of an interlaced picture, or of one that is not.
ADAM7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
AT_ONCE = ((0, 1, 0, 1),)
# Pixels cannot be decoded without these; their checks are the decoder's. tRNS of a palette is kept too.
CRITICAL = (b"IHDR", b"PLTE")
ANCILLARY = (b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")
# Browsers take gAMA alone for sRGB as long as it is as near as this to 1 / 2.2.
GAMMA_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class PngChunks:
    """A PNG taken apart.

    Attributes:
        plain: a PNG of the same pixels and palette, and of nothing else; cut where the file is cut.
        bits: of a sample.
        colour_key: the grey or RGB value, of `bits` bits, that is see-through.
        profile: the ICC profile of its colours, also one made from cICP, or gAMA and cHRM; None for sRGB.
        exif: content of the eXIf chunk in front of the pixels.
    """

    plain: bytes
    bits: int
    colour_key: tuple[int, ...] | None
    profile: bytes | None
    exif: bytes


def read_png(data: bytes) -> PngChunks:
    """Take apart what begins with a PNG's signature; `data` may end anywhere behind the head of its first IDAT.

    Raises:
        ValueError: it ends before its pixels, or has no sound header.
    """
    chunks, kept, position = _chunks_before_pixels(data)
    if len(chunks.get(b"IHDR", b"")) != 13:
        raise ValueError("a PNG without its header")
    bits, colour_type = chunks[b"IHDR"][8:10]
    plain = b"".join((SIGNATURE, *kept, data[position : _end_of_pixels(data, position)]))
    return PngChunks(
        plain=plain,
        bits=bits,
        colour_key=_colour_key(chunks.get(b"tRNS", b""), bits=bits, colour_type=colour_type),
        profile=_profile(chunks),
        exif=chunks.get(b"eXIf", b""),
    )


def _chunks_before_pixels(data: bytes) -> tuple[dict[bytes, bytes], list[bytes], int]:
    """Return the first chunk of each known name, the bytes of those that pixels need, and where pixels begin."""
    chunks: dict[bytes, bytes] = {}
    kept: list[bytes] = []
    position = len(SIGNATURE)
    while (name := data[position + 4 : position + HEAD_BYTES]) != b"IDAT":
        end = position + HEAD_BYTES + int.from_bytes(data[position : position + 4]) + CRC_BYTES
        if end > len(data) or name == b"IEND":
            raise ValueError("a PNG without pixels")
        is_ancillary = name in ANCILLARY and _is_sound(data, position, end)
        if name not in chunks and (name in CRITICAL or is_ancillary):
            chunks[name] = data[position + HEAD_BYTES : end - CRC_BYTES]
            is_palettes = name == b"tRNS" and b"PLTE" in chunks and chunks.get(b"IHDR", b"")[9:10] == b"\3"
            if name in CRITICAL or is_palettes:
                kept.append(data[position:end])
        position = end
    return chunks, kept, position


def _is_sound(data: bytes, start: int, end: int) -> bool:
    found = zlib.crc32(memoryview(data)[start + 4 : end - CRC_BYTES])
    return found == int.from_bytes(data[end - CRC_BYTES : end])


def _end_of_pixels(data: bytes, position: int) -> int:
    while data[position + 4 : position + HEAD_BYTES] == b"IDAT":
        position += HEAD_BYTES + int.from_bytes(data[position : position + 4]) + CRC_BYTES
    return min(position, len(data))


def _colour_key(content: bytes, *, bits: int, colour_type: int) -> tuple[int, ...] | None:
    num_values = {GREY: 1, TRUECOLOUR: 3}.get(colour_type)
    if num_values is None or len(content) < 2 * num_values:
        return None
    # Values have 16 bits in the file; those beyond `bits` are to be ignored.
    return tuple(value & (1 << bits) - 1 for value in struct.unpack_from(f">{num_values}H", content))


def _profile(chunks: dict[bytes, bytes]) -> bytes | None:
    """Return the profile that counts: cICP before iCCP before sRGB before gAMA, as browsers have it."""
    if (profile := _coding_independent(chunks.get(b"cICP", b""))) is not None:
        return profile
    if (profile := _embedded(chunks.get(b"iCCP", b""))) is not None:
        return profile
    if b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
        return None
    gamma = int.from_bytes(chunks[b"gAMA"]) / 100_000
    if gamma == 0:
        return None
    if len(chunks.get(b"cHRM", b"")) == 32:
        white, *primaries = ((x / 100_000, y / 100_000) for x, y in struct.iter_unpack(">2I", chunks[b"cHRM"]))
        return matrix_profile(primaries, white=white, curve=(1 / gamma,))
    if abs(gamma * 2.2 - 1) < GAMMA_TOLERANCE:
        return None
    return matrix_profile(PRIMARIES[1], curve=(1 / gamma,))


def _coding_independent(content: bytes) -> bytes | None:
    # Full-range RGB is all that PNG allows; HDR's curves are left alone, as what they look like depends on the screen.
    if len(content) != 4 or content[2:] != b"\0\1" or content[0] not in PRIMARIES or content[1] not in TRANSFERS:
        return None
    return matrix_profile(PRIMARIES[content[0]], curve=TRANSFERS[content[1]])


def _embedded(content: bytes) -> bytes | None:
    _, _, packed = content.partition(b"\0")
    if packed[:1] != b"\0":  # the only method of compression
        return None
    try:
        return whole_profile(zlib.decompressobj().decompress(packed[1:], MAX_PROFILE_BYTES))
    except zlib.error:
        return None


def complete_png(data: bytes, max_missing: float) -> tuple[bytes, ...]:
    """Return a PNG that is cut among its pixels with zeros for those it lacks; none if these are more than a share.

    Raises:
        ValueError: it ends before its pixels.
    """
    chunks, _, position = _chunks_before_pixels(data)
    width, height, bits, colour_type, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    bits_per_pixel = bits * NUM_CHANNELS[colour_type]
    num_bytes = 0
    for top, down, left, across in ADAM7 if is_interlaced else AT_ONCE:
        if num_columns := len(range(left, width, across)):
            num_bytes += len(range(top, height, down)) * (1 + math.ceil(num_columns * bits_per_pixel / 8))
    pixels = zlib.decompressobj().decompress(_content_of_pixels(data, position), num_bytes)
    if num_bytes - len(pixels) > max_missing * num_bytes:
        return ()
    content = zlib.compress(pixels.ljust(num_bytes, b"\0"), 1)
    return (data[:position] + _chunk(b"IDAT", content) + _chunk(b"IEND", b""),)


def _content_of_pixels(data: bytes, position: int) -> bytes:
    parts = []
    while data[position + 4 : position + HEAD_BYTES] == b"IDAT":
        end = position + HEAD_BYTES + int.from_bytes(data[position : position + 4])
        parts.append(data[position + HEAD_BYTES : end])
        position = end + CRC_BYTES
    return b"".join(parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
