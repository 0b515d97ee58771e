"""Files that lack their last bytes, completed, so that those in which nearly no pixel is missing can be decoded."""

import re
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.raw.pictures.png_chunks import SIGNATURE as PNG_SIGNATURE
from pipelines.raw.pictures.png_chunks import complete_png

MAX_MISSING = 0.01  # of the pixels: of the last row of blocks of a photo, less than half
MAX_MISSING_BYTES = 0.1  # of a WebP; which pixels these were is seen once it is decoded
WEBP_CHUNKS_AT, WEBP_PICTURES = 12, {b"VP8 ", b"VP8L", b"ANMF"}
WEBP_FILLS = (b"\x55", b"\xaa", b"\xff")  # not each is such as a decoder takes
CORNER_PIXELS = 4
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
# What is made up is grey in one completion and noise in the other. Two bytes of 255 would be a marker.
NOISE = np.random.default_rng(0).integers(1, 255, 1 << 16, dtype=np.uint8).tobytes()
# What begins the segment with the interval of restarts, and the noise in front of each of their eight marks.
RESTARTS, NOISE_BYTES = b"\xff\xdd\x00\x04", 512
NOISE_STARTS = range(0, 8 * NOISE_BYTES, NOISE_BYTES)
# Markers that stand among the bytes of pixels are none: restarts, and 255 itself.
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
SCAN, END, NUM_COEFFICIENTS = 0xDA, 0xD9, 64
GIF_EXTENSION, GIF_PICTURE = 0x21, 0x2C
NUM_LZW_BITS = 9  # of a code, at least, once a picture has some pixels


def completions(data: bytes) -> Sequence[bytes]:
    """Return a cut file made whole: in no way, in one, or in several that differ in the pixels that are made up.

    A single one has no more than `MAX_MISSING` of its pixels made up, or cannot be decoded either.
    """
    try:
        if data.startswith(JPEG):
            return _jpegs(data)
        if is_cut_webp(data):
            return _webps(data)
        if data.startswith(PNG_SIGNATURE):
            return complete_png(data, MAX_MISSING)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gifs(data)
    except (LookupError, struct.error, ValueError, zlib.error):  # damaged, or cut in front of its pixels
        return ()
    return (data + bytes(int(len(data) * MAX_MISSING)),) if data.startswith((b"BM", b"P5", b"P6")) else ()


def is_cut_webp(data: bytes) -> bool:
    """Tell whether it is a WebP of fewer bytes than it says that it has."""
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) < _webp_bytes(data)


def share_made_up(first: np.ndarray, second: np.ndarray) -> float:
    """Return in which share of the pixels, [H, W] or [H, W, C], two completions differ."""
    differs = first != second
    return float(differs.mean() if differs.ndim == 2 else differs.any(axis=2).mean())


def _jpegs(data: bytes) -> tuple[bytes, ...]:
    if not _are_all_scans_there(data):
        return ()
    data = data.removesuffix(b"\xff")
    # Noise as long as what is there, so that nothing behind it is grey in both.
    return data + JPEG_END, data + _jpeg_noise(data) + JPEG_END


def _jpeg_noise(data: bytes) -> bytes:
    """Return noise as long as a JPEG; where that has restarts, with all of their marks again and again."""
    if RESTARTS not in data:
        return _filled(NOISE, len(data))
    parts = [
        NOISE[start : start + NOISE_BYTES] + b"\xff%c" % (0xD0 + place) for place, start in enumerate(NOISE_STARTS)
    ]
    return _filled(b"".join(parts), len(data))


def with_noise_at_end(data: bytes, image: Image.Image, *, is_progressive: bool) -> bytes | None:
    """Return a JPEG with noise in front of its end mark, which shows where pixels are missing; None: none seem to be.

    What libjpeg makes up for missing data is of one colour down to the last corner; of a progressive one scans are
    missing, unless it is the last one that is cut.

    Args:
        image: what it decodes to.
    """
    body = data.rstrip(b"\0")
    if not data.startswith(JPEG) or not body.endswith(JPEG_END):
        return None
    if is_progressive:
        if _are_all_scans_there(data):
            return None
    elif not _has_plain_corner(image):
        return None
    return body.removesuffix(JPEG_END) + _jpeg_noise(data) + JPEG_END


def _has_plain_corner(image: Image.Image) -> bool:
    # Cut out first: all pixels as an array cost a tenth of decoding them.
    box = (max(0, image.width - CORNER_PIXELS), max(0, image.height - CORNER_PIXELS), image.width, image.height)
    corner = np.asarray(image.crop(box))
    return not (corner != corner[:1, :1]).any()


def _are_all_scans_there(data: bytes) -> bool:
    """Tell whether a scan with the last bit of each coefficient has begun (ITU-T T.81, G.1.1.1)."""
    lacks: dict[int, np.ndarray] = {}  # which coefficients lack bits, by component
    position = 0
    while (marker := MARKER.search(data, position)) is not None and marker[1][0] != END:
        code, position = marker[1][0], marker.end()
        if code == JPEG[1] or code == 1:  # these have no content
            continue
        content = data[position + 2 : position + int.from_bytes(data[position : position + 2])]
        position += 2 + len(content)
        if code in FRAME_MARKERS:
            lacks = {component: np.ones(NUM_COEFFICIENTS, bool) for component in content[6 : 6 + 3 * content[5] : 3]}
        elif code == SCAN:
            *_, first, last, bits = content
            for component in content[1 : 1 + 2 * content[0] : 2]:
                lacks.get(component, np.ones(NUM_COEFFICIENTS))[first : last + 1] = bits & 15
    return bool(lacks) and not any(missing.any() for missing in lacks.values())


def _webps(data: bytes) -> tuple[bytes, ...]:
    """Leave a chunk out that is cut behind a picture, or lengthen that of its pixels: made up, they may take more."""
    names, start, end = set(), 0, WEBP_CHUNKS_AT
    while end < len(data):
        start, end = end, end + 8 + (int.from_bytes(data[end + 4 : end + 8], "little") + 1 & ~1)
        names |= {data[start : start + 4]} if end <= len(data) else set()
    if names & WEBP_PICTURES:
        return (_with_webp_size(data[:start]),)
    num_missing = end - len(data)
    if num_missing > len(data) * MAX_MISSING_BYTES:
        return ()
    # Each chunk has an even size.
    num_bytes = num_missing + int(len(data) * MAX_MISSING_BYTES) // 2 * 2
    chunk = data[start : start + 4] + struct.pack("<I", len(data) + num_bytes - start - 8) + data[start + 8 :]
    fills = (b"\0", *WEBP_FILLS, NOISE)
    return tuple(_with_webp_size(data[:start] + chunk + _filled(fill, num_bytes)) for fill in fills)


def _with_webp_size(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def _filled(fill: bytes, num_bytes: int) -> bytes:
    return (fill * (1 + num_bytes // len(fill)))[:num_bytes]


def _webp_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _gifs(data: bytes) -> tuple[bytes, ...]:
    """Fill the first picture up with zeros, each of them at least one code of the first colour, and so one pixel."""
    position = _end_of_gif_table(data, 13, flags=data[10])
    while data[position] == GIF_EXTENSION:
        position = _end_of_gif_blocks(data, position + 2)
    if data[position] != GIF_PICTURE:
        return ()
    width, height, flags = struct.unpack_from("<HHB", data, position + 5)
    position = _end_of_gif_table(data, position + 10, flags=flags) + 1
    while position < len(data) and data[position]:
        position += 1 + data[position]
    num_missing = int(width * height * MAX_MISSING) * NUM_LZW_BITS // 8
    blocks = b"".join(b"\xff" + bytes(255) for _ in range(num_missing // 255))
    return (data[:position] + bytes(max(0, position - len(data))) + blocks + b"\0;",)


def _end_of_gif_table(data: bytes, start: int, *, flags: int) -> int:
    return start + (3 << (flags & 7) + 1 if flags & 128 else 0)


def _end_of_gif_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1
