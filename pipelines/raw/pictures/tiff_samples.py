"""TIFFs that Pillow cannot open or misreads: other than 8 bits, signed, floating point, L*a*b*, YCbCr, grey with alpha.

libtiff, which Pillow brings, unpacks their strips or tiles as bytes; what these mean is read here (TIFF 6.0 and its
technical notes). Pictures of eight bits, and those compressed as JPEG or a fax, are Pillow's.
"""

# H W pixels, S samples of a pixel, T tiles side by side (1 where there are strips), B bytes of a tile's row

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 257, 258, 259, 262, 274, 277
ROWS_PER_STRIP, PLANES, PREDICTOR, COLOUR_MAP, TILE_WIDTH, EXTRA_SAMPLES = 278, 284, 317, 320, 322, 338
SAMPLE_FORMAT, SUBSAMPLING, ICC_PROFILE = 339, 530, 34675
DEFAULTS = {COMPRESSION: 1, ORIENTATION: 1, SAMPLES: 1, PLANES: 1, PREDICTOR: 1, SAMPLE_FORMAT: 1}
WANTED = (
    *(WIDTH, HEIGHT, BITS, PHOTOMETRIC, *DEFAULTS),
    *(TILE_WIDTH, EXTRA_SAMPLES, COLOUR_MAP, SUBSAMPLING, ICC_PROFILE),
)
# What a copy is unpacked by, as bytes and in no order but the file's.
KEPT = (COMPRESSION, 266, 273, 279, TILE_WIDTH, 323, 324, 325)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
NUM_COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, CIELAB: 3, ICCLAB: 3}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
# More samples than colours and alpha, or wider tiles beyond the picture, are damage that asks for memory.
MAX_EXTRA_SAMPLES, MAX_TILE_PIXELS = 4, 4096
MAX_SAMPLES_OF_PILLOW = 4
PREMULTIPLIED, SEPARATE = 1, 2  # kinds of alpha
# By which the strips or tiles of a picture are found; of one stored plane by plane, those of each plane in turn.
PLACES = (273, 279, 324, 325)
# None, LZW, deflate by its two numbers, PackBits, LZMA, Zstandard.
COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
BYTES, SHORT, LONG = "BsBHIQbBhi", 3, 4  # formats by a tag's type; its types of two and four bytes
# By custom floating point is 0 to 1 or has the numbers of 8 or 16 bits.
FLOAT_WHITES = (1.0, 255.0, 65535.0)


@dataclass(frozen=True, kw_only=True)
class TiffSamples:
    """The first picture of a TIFF, to be decoded here; width and height in pixels, before it is turned."""

    data: bytes
    order: str
    entries: Mapping[int, bytes]
    width: int
    height: int
    orientation: int
    profile: bytes | None
    bits: int
    photometric: int
    num_samples: int
    sample_format: int
    alpha: int | None
    alpha_place: int
    predictor: int
    is_planar: bool
    tile_width: int
    subsampling: tuple[int, ...]
    colour_map: tuple[int, ...]

    def load(self) -> Image.Image:
        """Decode to L, RGB, CMYK or LAB; with alpha to LA or RGBA.

        Raises:
            Exception: the file is damaged, in what words Pillow's decoders have.
        """
        num_colours = NUM_COLOURS[self.photometric]
        samples = self._samples()
        image = self._image(samples[..., :num_colours])
        if self.alpha not in (PREMULTIPLIED, SEPARATE) or image.mode not in ("L", "RGB", "CMYK"):
            return image
        alpha = self._to_eight_bits(samples[..., self.alpha_place])
        if image.mode == "CMYK":  # less ink is over white
            share = np.float32(1 / 255) * (255 if self.alpha == PREMULTIPLIED else alpha[..., None])
            return Image.fromarray((np.asarray(image) * share).round().astype(np.uint8), "CMYK")
        if self.alpha == PREMULTIPLIED:
            premultiplied = np.asarray(image, np.float32).reshape(self.height, self.width, -1)
            whole = premultiplied * (255.0 / np.maximum(alpha, 1)[..., None])
            image = Image.fromarray(whole.round().clip(0, 255).astype(np.uint8).reshape(np.asarray(image).shape))
        image.putalpha(Image.fromarray(alpha))
        return image

    def _samples(self) -> np.ndarray:
        """Return the samples as they are stored, [H, W, S]."""
        if self.photometric == YCBCR:
            return self._subsampled()
        if self.is_planar:
            return np.concatenate([self._plane(number)._samples() for number in range(self.num_samples)], axis=2)
        row = self.tile_width * self.num_samples
        num_tiles = -(-self.width // self.tile_width)
        bytes_of_row = -(-row * self.bits // 8)
        rows = self._bytes(num_tiles * bytes_of_row, self.height).reshape(self.height, num_tiles, bytes_of_row)
        if self.predictor == 3:
            values = _add_up_bytes(rows, self.num_samples, self.bits // 8).view(f">f{self.bits // 8}")
        elif self.bits in (8, 16, 32, 64):
            values = rows.view(f"{self.order}{' uif'[self.sample_format]}{self.bits // 8}")
        else:
            values = _unpack_bits(rows, self.bits)[..., :row]
        values = values.reshape(self.height, num_tiles, self.tile_width, self.num_samples)
        if self.predictor == 2:  # differences of neighbours, which overflow
            values = np.cumsum(values, axis=2, dtype=values.dtype.newbyteorder("="))
        return values.reshape(self.height, -1, self.num_samples)[:, : self.width]

    def _plane(self, number: int) -> "TiffSamples":
        """Return the picture of one sample alone, of those that are stored one after the other."""
        entries = dict(self.entries)
        for tag in PLACES:
            if tag in entries:
                values = _values(self.data, self.order, entries[tag])
                kind, count = struct.unpack_from(self.order + "HI", entries[tag], 2)
                count //= self.num_samples
                size = struct.calcsize(BYTES[kind])
                (start,) = struct.unpack_from(self.order + "I", entries[tag], 8)
                where = struct.pack(self.order + "I", start + number * count * size)
                if count * size <= 4:
                    packed = struct.pack(f"{self.order}{count}{BYTES[kind]}", *values[number * count :][:count])
                    where = packed.ljust(4, b"\0")
                entries[tag] = struct.pack(self.order + "HHI", tag, kind, count) + where
        return replace(self, entries=entries, num_samples=1, is_planar=False)

    def _subsampled(self) -> np.ndarray:
        """Return Y, Cb and Cr, [H, W, 3]: stored are blocks of Y, each with one Cb and one Cr."""
        across, down = self.subsampling
        num_across, num_down = -(-self.width // across), -(-self.height // down)
        blocks = self._bytes(num_across * (across * down + 2), num_down).reshape(num_down, num_across, -1)
        light = blocks[..., :-2].reshape(num_down, num_across, down, across).swapaxes(1, 2)
        colour = blocks[..., -2:].repeat(down, axis=0).repeat(across, axis=1)
        pixels = np.concatenate([light.reshape(num_down * down, num_across * across, 1), colour], axis=2)
        return pixels[: self.height, : self.width]

    def _bytes(self, width: int, height: int) -> np.ndarray:
        """Return what is in strips or tiles, [height, width], unpacked as if it were grey of eight bits."""
        tags = {tag: self.entries[tag] for tag in KEPT if tag in self.entries}
        numbers = {WIDTH: width, HEIGHT: height, BITS: 8, PHOTOMETRIC: BLACK_IS_ZERO, SAMPLES: 1}
        if TILE_WIDTH in tags:
            numbers[TILE_WIDTH] = -(-self.tile_width * self.num_samples * self.bits // 8)
        elif ROWS_PER_STRIP in self.entries:
            rows_per_strip = min(self.height, _values(self.data, self.order, self.entries[ROWS_PER_STRIP])[0])
            numbers[ROWS_PER_STRIP] = -(-rows_per_strip // (self.subsampling[1] if self.photometric == YCBCR else 1))
        tags |= {tag: struct.pack(self.order + "HHII", tag, LONG, 1, number) for tag, number in numbers.items()}
        start = len(self.data) + len(self.data) % 2
        directory = struct.pack(self.order + "H", len(tags)) + b"".join(tags[tag] for tag in sorted(tags)) + bytes(4)
        header = self.data[:4] + struct.pack(self.order + "I", start)
        copy = b"".join((header, self.data[8:], bytes(len(self.data) % 2), directory))
        with Image.open(io.BytesIO(copy), formats=("TIFF",)) as image:
            return np.asarray(image)

    def _image(self, samples: np.ndarray) -> Image.Image:
        if self.photometric == PALETTE:
            colours = np.array(self.colour_map, np.uint16).reshape(3, -1).T
            colours = colours if _is_of_bytes(self.colour_map) else colours >> 8
            return Image.fromarray(colours.astype(np.uint8)[np.minimum(samples[..., 0], len(colours) - 1)])
        if self.photometric in (CIELAB, ICCLAB):
            return Image.frombytes("LAB", (self.width, self.height), self._lab_bytes(samples).tobytes())
        colours = self._to_eight_bits(samples)
        if self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
            return Image.fromarray(colours[..., 0] ^ (255 if self.photometric == WHITE_IS_ZERO else 0))
        mode = {RGB: "RGB", CMYK: "CMYK", YCBCR: "YCbCr"}[self.photometric]
        image = Image.frombytes(mode, (self.width, self.height), colours.tobytes())
        return image.convert("RGB") if mode == "YCbCr" else image

    def _lab_bytes(self, samples: np.ndarray) -> np.ndarray:
        """Return L* from 0 to 255, a* and b* as signed bytes: the upper ones of CIELab; ICCLab's have an offset."""
        values = samples if self.bits == 8 else (samples >> 8).astype(np.uint8)
        if self.photometric == ICCLAB:
            values = values ^ np.array([0, 128, 128], np.uint8)
            if self.bits == 16:  # 100 is 0xFF00
                values[..., 0] = np.minimum(samples[..., 0] / (65_280 / 255), 255).round()
        return values

    def _to_eight_bits(self, samples: np.ndarray) -> np.ndarray:
        if self.sample_format == SIGNED and self.bits < 32:
            # The full range, as ImageMagick has it: the lowest number is black, and zero a middle grey.
            samples = (samples.astype(np.uint32) & (1 << self.bits) - 1) ^ (1 << self.bits - 1)
        if self.sample_format != FLOAT and self.bits < 32:
            # As browsers and Pillow have it: of more than eight bits the upper ones.
            if self.bits >= 8:
                return (samples >> (self.bits - 8)).astype(np.uint8)
            return (samples * (255.0 / ((1 << self.bits) - 1))).round().astype(np.uint8)
        return scale_to_eight_bits(samples, whites=self._whites())

    def _whites(self) -> tuple[float, ...]:
        if self.sample_format == FLOAT:
            return FLOAT_WHITES
        return (65535.0, 2.0 ** (self.bits - (self.sample_format == SIGNED)) - 1)


def scale_to_eight_bits(values: np.ndarray, *, whites: Sequence[float]) -> np.ndarray:
    """Return numbers as uint8 of the same shape, where their type does not say what is white.

    White is the first of `whites` that is not exceeded, or the brightest number; what is not finite is black.
    """
    values = np.nan_to_num(np.asarray(values, np.float64), posinf=0.0, neginf=0.0)
    brightest = float(values.max(initial=0))
    white = next((value for value in whites if brightest <= value), brightest)
    return (values.clip(0, white) * (255.0 / white)).astype(np.uint8)


def read_tiff(data: bytes) -> TiffSamples | None:
    """Return a TIFF whose samples are to be read here, or None: it is Pillow's, or no sound TIFF of this kind."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return None
    try:
        entries = _entries(data, order)
        tags = {tag: _values(data, order, entry) for tag, entry in entries.items() if tag in WANTED}
    except (struct.error, IndexError):
        return None
    first = DEFAULTS | {tag: values[0] for tag, values in tags.items() if values}
    if any(tag not in first for tag in (WIDTH, HEIGHT, BITS, PHOTOMETRIC)) or not _is_read_here(tags, first):
        return None
    num_samples, photometric = first[SAMPLES], first[PHOTOMETRIC]
    # Pillow too takes one sample more than there are colours for alpha if nothing is said.
    extra = tags.get(EXTRA_SAMPLES, (SEPARATE,)) if num_samples > NUM_COLOURS[photometric] else ()
    place = next((place for place, kind in enumerate(extra) if kind in (PREMULTIPLIED, SEPARATE)), None)
    return TiffSamples(
        data=data,
        order=order,
        entries=entries,
        width=first[WIDTH],
        height=first[HEIGHT],
        orientation=first[ORIENTATION],
        profile=bytes(tags[ICC_PROFILE]) if ICC_PROFILE in tags else None,
        bits=first[BITS],
        photometric=photometric,
        num_samples=num_samples,
        sample_format=first[SAMPLE_FORMAT],
        alpha=None if place is None else extra[place],
        alpha_place=NUM_COLOURS[photometric] + (place or 0),
        predictor=first[PREDICTOR],
        is_planar=first[PLANES] == 2 and num_samples > 1,
        tile_width=first.get(TILE_WIDTH, first[WIDTH]),
        subsampling=(tags.get(SUBSAMPLING) or (2, 2))[:2],
        colour_map=tags.get(COLOUR_MAP, ()),
    )


def _is_read_here(tags: Mapping[int, tuple[int, ...]], first: Mapping[int, int]) -> bool:
    bits, photometric, num_samples, sample_format = (first[tag] for tag in (BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT))
    is_single = bits in (1, 2, 4, 8) and num_samples == 1 and photometric <= PALETTE
    has_colours = bits == 8 and photometric in (RGB, CMYK) and num_samples <= MAX_SAMPLES_OF_PILLOW
    if sample_format != SIGNED and (has_colours or (is_single and not _is_of_bytes(tags.get(COLOUR_MAP, ())))):
        return False
    if photometric in (CIELAB, ICCLAB):
        is_possible = bits in (8, 16)  # whose halves differ in sign, which the format of samples does not tell
    elif photometric == YCBCR:
        is_possible = bits == 8 and num_samples == 3 and first[PREDICTOR] == 1 and TILE_WIDTH not in first
    elif photometric == PALETTE:
        is_possible = sample_format == UNSIGNED and bits <= 16 and len(tags.get(COLOUR_MAP, ())) == 3 << bits
    else:
        is_possible = bits in (16, 32, 64) or (bits < 32 and sample_format != FLOAT)
    return (
        is_possible
        and photometric in NUM_COLOURS
        and 0 <= num_samples - NUM_COLOURS[photometric] <= MAX_EXTRA_SAMPLES
        and len(set(tags[BITS])) == 1
        and sample_format in (UNSIGNED, SIGNED, FLOAT)
        and (first[PREDICTOR] == 1 or (bits in (8, 16, 32, 64) and first[PREDICTOR] in (2, 3)))
        and first[COMPRESSION] in COMPRESSIONS
        and (first[PLANES] == 1 or (first[PLANES] == 2 and photometric != YCBCR))
        and min(first[WIDTH], first[HEIGHT], first.get(TILE_WIDTH, 1)) > 0
        and first.get(TILE_WIDTH, 1) <= max(first[WIDTH], MAX_TILE_PIXELS)
    )


def _is_of_bytes(colour_map: Sequence[int]) -> bool:
    """Whether colours are numbers of eight bits, as old programs have written them, and not of sixteen."""
    return 0 < max(colour_map, default=0) < 256


def _entries(data: bytes, order: str) -> dict[int, bytes]:
    (start,) = struct.unpack_from(order + "I", data, 4)
    (num_entries,) = struct.unpack_from(order + "H", data, start)
    if start + 2 + 12 * num_entries > len(data):
        raise IndexError("the directory is cut off")
    entries = (data[start + 2 + 12 * index : start + 14 + 12 * index] for index in range(num_entries))
    return {struct.unpack_from(order + "H", entry)[0]: entry for entry in entries}


def _values(data: bytes, order: str, entry: bytes) -> tuple[int, ...]:
    kind, count = struct.unpack_from(order + "HI", entry, 2)
    layout = f"{order}{count}{BYTES[kind]}" if kind not in (2, 5) else f"{order}0B"
    if struct.calcsize(layout) <= 4:
        return struct.unpack_from(layout, entry, 8)
    return struct.unpack_from(layout, data, struct.unpack_from(order + "I", entry, 8)[0])


def _add_up_bytes(rows: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Undo the floating-point predictor, [H, T, B]: differences of bytes, the highest of all numbers first."""
    height, num_tiles, num_bytes = rows.shape
    added = np.cumsum(rows.reshape(height, num_tiles, -1, num_samples), axis=2, dtype=np.uint8)
    planes = added.reshape(height, num_tiles, size, num_bytes // size)
    return np.ascontiguousarray(planes.swapaxes(2, 3)).reshape(rows.shape)


def _unpack_bits(rows: np.ndarray, bits: int) -> np.ndarray:
    """Return the numbers of `bits` bits in rows of bytes, highest bit first, as uint32."""
    ones = np.unpackbits(rows, axis=-1)
    ones = ones[..., : ones.shape[-1] // bits * bits].reshape(*rows.shape[:-1], -1, bits)
    return ones @ (1 << np.arange(bits - 1, -1, -1, dtype=np.uint32))
