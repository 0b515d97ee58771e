"""Opening the bytes of one picture: its size, and how its pixels become RGB on white as a browser shows them."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile

from pipelines.raw.pictures.bmp_masks import BmpMasks, profile_of_bmp, read_bmp
from pipelines.raw.pictures.colour_boxes import profile_of_boxes
from pipelines.raw.pictures.cut_files import completions, is_cut_webp, share_made_up, with_noise_at_end
from pipelines.raw.pictures.icc import lab_transform, show_as_srgb, whole_profile
from pipelines.raw.pictures.jpeg_segments import without_short_segments
from pipelines.raw.pictures.png_chunks import SIGNATURE as PNG_SIGNATURE
from pipelines.raw.pictures.png_chunks import PngChunks, read_png
from pipelines.raw.pictures.tiff_samples import FLOAT_WHITES, TiffSamples, read_tiff, scale_to_eight_bits

# What Pillow may take bytes for. It knows others that start programs (EPS) or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM")
# How a picture is turned by its EXIF orientation; those from 5 on exchange width and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class UnsupportedPictureError(Exception):
    """A picture of a known format that is not read; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture whose header has been read.

    Attributes:
        width, height: in pixels, as stored.
        orientation: EXIF's, 1 to 8, that is still to be applied.
        profile: the ICC profile of its colours.
        pixels: decodes; gives any of Pillow's modes, transparency as alpha or in `info`.
    """

    width: int
    height: int
    orientation: int
    profile: bytes | None
    pixels: Callable[[], Image.Image]

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height in pixels, as it is shown."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else (self.width, self.height)

    def show(self, image: Image.Image) -> Image.Image:
        """Return its decoded pixels as RGB in sRGB, over white and turned.

        Raises:
            ValueError, OSError: its mode cannot be converted.
            Exception: whatever else is not as Pillow takes it to be, such as a palette that the file lacks.
        """
        shown = _over_white(image, self.profile)
        shown.info = {}  # what was true of the file is not of the picture
        turn = TURNS.get(self.orientation)
        return shown if turn is None else shown.transpose(turn)


def open_picture(data: bytes) -> Picture:
    """Read the header of a picture; no pixel is decoded.

    Raises:
        UnidentifiedImageError: it is no picture.
        UnsupportedPictureError: it is one of a format that is not read.
        Exception: whatever else the bytes lead a decoder into.
    """
    if is_cut_webp(data) and (whole := completions(data)):  # Pillow reads nothing of it
        return replace(open_picture(whole[0]), pixels=_raise_cut)
    if data.startswith(PNG_SIGNATURE):
        return _open_png(data)
    if (bitmap := read_bmp(data)) is not None:
        return _read_here(bitmap, profile=profile_of_bmp(data))
    if (samples := read_tiff(data)) is not None:
        return _read_here(samples, orientation=samples.orientation, profile=samples.profile)
    image = _open(data)
    return Picture(
        width=image.width,
        height=image.height,
        # Pillow turns a TIFF itself.
        orientation=1 if image.format == "TIFF" else _orientation(image.info.get("exif", b"")),
        profile=_profile(image, data),
        pixels=lambda: _load(image),
    )


def decode_cut(data: bytes) -> tuple[Image.Image, float] | None:
    """Return the pixels of a file that lacks its last bytes, and which share of them is made up; None: not known.

    Raises:
        Exception: it is not this that the file lacks.
    """
    whole, *others = completions(data) or (None,)
    if whole is None:
        return None
    image = open_picture(whole).pixels()
    for other in others:
        with contextlib.suppress(ValueError, OSError):
            return image, share_made_up(np.asarray(image), np.asarray(open_picture(other).pixels()))
    return None if others else (image, 0.0)


def share_never_there(data: bytes, image: Image.Image) -> float:
    """Return which share of the pixels of a file that has been decoded it never had, though it has its end."""
    other = with_noise_at_end(data, image, is_progressive="progressive" in image.info)
    if other is None:
        return 0.0
    with contextlib.suppress(ValueError, OSError):
        first, second = np.asarray(image), np.asarray(open_picture(other).pixels())
        return 0.0 if np.array_equal(first, second) else share_made_up(first, second)
    return 0.0


def _raise_cut() -> Image.Image:
    raise ValueError("a WebP that is cut off")


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if (readable := without_short_segments(data)) is not None:
            return _open(readable)
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
            return _open_heif(data)
        if data.startswith(JPEG_XL):
            raise UnsupportedPictureError("JPEG XL") from None
        if data.startswith(TIFF):
            raise ValueError("a TIFF that is damaged, or of samples that are not read") from error
        raise


def _open_heif(data: bytes) -> Image.Image:
    try:
        # Large, and few data sets have any.
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        raise UnsupportedPictureError("HEIC is read after: pip install 'pixart-atelier[heic]'") from None
    return HeifImageFile(io.BytesIO(data))


def _read_here(picture: BmpMasks | TiffSamples, *, orientation: int = 1, profile: bytes | None = None) -> Picture:
    return Picture(
        width=picture.width,
        height=picture.height,
        orientation=orientation,
        profile=profile and whole_profile(profile),
        pixels=picture.load,
    )


def _profile(image: Image.Image, data: bytes) -> bytes | None:
    if image.format == "GIF":  # no browser knows its profiles
        return None
    profile = profile_of_bmp(data) if image.format == "BMP" else image.info.get("icc_profile")
    if profile:
        return whole_profile(profile)
    return profile_of_boxes(data) if image.format in ("AVIF", "JPEG2000", "HEIF") else None


def _open_png(data: bytes) -> Picture:
    chunks = read_png(data)
    image = Image.open(io.BytesIO(chunks.plain), formats=("PNG",))
    return Picture(
        width=image.width,
        height=image.height,
        orientation=_orientation(chunks.exif),
        profile=chunks.profile,
        pixels=lambda: _with_colour_key(image, chunks),
    )


def _orientation(exif: bytes) -> int:
    # Pictures with damaged EXIF are common, and are shown as they are stored. What XMP says no browser asks.
    with contextlib.suppress(Exception):
        tags = Image.Exif()
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    return 1


def _load(image: Image.Image) -> Image.Image:
    """Decode; a GIF's first frame that is smaller than its screen is see-through around it."""
    window = image.tile[0].extents if isinstance(image, GifImageFile) and image.tile else None
    image.load()
    if window is None or window == (0, 0, *image.size):
        return image
    screen = Image.new("RGBA", image.size)
    screen.paste(image.convert("RGBA").crop(window), window)
    return screen


def _with_colour_key(image: Image.Image, chunks: PngChunks) -> Image.Image:
    """Decode a PNG, and make see-through what has the colour of its key at the depth of the file."""
    if chunks.colour_key is None:
        image.load()
        return image
    lower = _lower_bytes(chunks) if chunks.bits == 16 and image.mode == "RGB" else None
    image.load()
    values = np.asarray(image)
    if lower is not None:
        values = values * np.uint16(256) + lower
    key = np.array(chunks.colour_key)
    if image.mode == "1":
        key = key != 0
    elif chunks.bits < 8:
        key = key * (255 // ((1 << chunks.bits) - 1))
    is_clear = (values == key).reshape(image.height, image.width, -1).all(axis=2)
    shown = _to_eight_bits(image)
    shown.putalpha(Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8)))
    return shown


def _lower_bytes(chunks: PngChunks) -> np.ndarray:
    """Return the lower bytes of a PNG of 16-bit RGB, [height, width, 3], of which Pillow gives the upper ones."""
    image = PngImageFile(io.BytesIO(chunks.plain))
    # Read as if the lower byte stood first, the lower one is what Pillow keeps.
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


def _over_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return show_as_srgb(image, profile)
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    colours = show_as_srgb(image.convert("L" if image.mode == "LA" else "RGB"), profile)
    return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return L, RGB, CMYK or a mode with transparency, in eight bits."""
    if image.mode.startswith("I;16"):
        # The upper byte, as browsers and Pillow's RGB have it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        whites = FLOAT_WHITES if image.mode == "F" else (65535.0,)
        return Image.fromarray(scale_to_eight_bits(np.asarray(image), whites=whites))
    if image.mode == "LAB":
        return lab_transform().apply(image)
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in ("RGB", "L", "CMYK") or image.has_transparency_data:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
