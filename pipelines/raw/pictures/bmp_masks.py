"""BMPs whose pixels are bit fields, with or without alpha, of which Pillow knows a few; and the profiles of BMPs."""

import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

MASKS_AT = 54  # behind a header of 40 bytes, or within a longer one
PLAIN, BITFIELDS, ALPHA_BITFIELDS = 0, 3, 6
# Headers from these sizes on have a fourth mask, and may name an ICC profile.
WITH_ALPHA_BYTES, WITH_PROFILE_BYTES = 56, 124
FILE_HEADER_BYTES, COLOUR_SPACE_AT, PROFILE_AT, EMBEDDED = 14, 70, 126, b"DEBM"


@dataclass(frozen=True, kw_only=True)
class BmpMasks:
    """A BMP of bit fields; `masks` are red's, green's, blue's and, 0 if there is none, alpha's."""

    data: bytes
    start: int
    width: int
    height: int
    bits: int
    is_top_down: bool
    masks: tuple[int, int, int, int]

    def load(self) -> Image.Image:
        """Decode to RGB, or to RGBA if there is alpha.

        Raises:
            ValueError: the file ends before its pixels do.
        """
        pixel_bytes = self.bits // 8
        row_bytes = -(-self.width * pixel_bytes // 4) * 4
        if len(self.data) < self.start + row_bytes * self.height:
            raise ValueError(f"{len(self.data)} bytes are too few for {self.width} x {self.height} pixels")
        rows = np.frombuffer(self.data, np.uint8, row_bytes * self.height, self.start).reshape(self.height, row_bytes)
        pixels = np.ascontiguousarray(rows[:, : self.width * pixel_bytes]).view(f"<u{pixel_bytes}").astype(np.uint32)
        if not self.is_top_down:
            pixels = pixels[::-1]
        channels = [_channel(pixels, mask) for mask in self.masks[: 4 if self.masks[3] else 3]]
        return Image.fromarray(np.stack(channels, axis=-1))


def _channel(pixels: np.ndarray, mask: int) -> np.ndarray:
    if mask == 0:
        return np.zeros(pixels.shape, np.uint8)
    lowest = (mask & -mask).bit_length() - 1
    values = (pixels & np.uint32(mask)) >> np.uint32(lowest)
    return (values * (255.0 / (mask >> lowest)) + 0.5).astype(np.uint8)


def read_bmp(data: bytes) -> BmpMasks | None:
    """Return a BMP of bit fields from its header, or None: it is another, or none that is sound."""
    if data[:2] != b"BM" or len(data) < MASKS_AT + 16:
        return None
    start, header_bytes, width, height, _, bits, compression = struct.unpack_from("<10xIIiiHHI", data)
    if bits not in (16, 32) or header_bytes < 40 or width <= 0 or height == 0:
        return None
    red, green, blue, alpha = struct.unpack_from("<4I", data, MASKS_AT)
    if header_bytes < WITH_ALPHA_BYTES and compression != ALPHA_BITFIELDS:
        alpha = 0
    # The alpha of longer headers counts, whatever they say of fields.
    if compression == PLAIN and bits == 32 and alpha:
        red, green, blue = 0xFF0000, 0xFF00, 0xFF
    elif compression not in (BITFIELDS, ALPHA_BITFIELDS):
        return None
    return BmpMasks(
        data=data,
        start=start,
        width=width,
        height=abs(height),
        bits=bits,
        is_top_down=height < 0,
        masks=(red, green, blue, alpha),
    )


def profile_of_bmp(data: bytes) -> bytes | None:
    """Return the ICC profile that a BMP names, which lies behind its pixels."""
    is_long = len(data) >= PROFILE_AT + 8 and int.from_bytes(data[14:18], "little") >= WITH_PROFILE_BYTES
    if not is_long or data[COLOUR_SPACE_AT : COLOUR_SPACE_AT + 4] != EMBEDDED:
        return None
    offset, size = struct.unpack_from("<2I", data, PROFILE_AT)
    return data[FILE_HEADER_BYTES + offset :][:size]
