"""One way to decode, turn, resize and crop an image, and the paper's 40 aspect-ratio buckets."""

import contextlib
import ctypes
import functools
import logging
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError, is_out_of_memory
from pipelines.raw.pictures.cut_files import MAX_MISSING
from pipelines.raw.pictures.open_picture import (
    Picture,
    UnsupportedPictureError,
    decode_cut,
    open_picture,
    share_never_there,
)

MIN_SIDE_PIXELS = 2
# A resized image of fewer targets than this is never too large: `max_pixels` may be smaller than a target.
ALWAYS_RESIZED = 20
# An image scaled up by more is visibly soft.
SOFT_SCALE = 1.25
BYTES_PER_PIXEL = 4  # of a decoded image
# (height, width) of SDXL's 40 training buckets in sixteenths of the base resolution.
SDXL_BUCKETS = (
    *((8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23)),
    *((11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16)),
    *((16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11)),
    *((23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8)),
)

# Of a million pictures from the web, thousands have odd metadata; and sizes are checked here, not by Pillow.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None
# What a reject says is not said on standard error too, by Pillow and the libtiff that it brings.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


# What libraries' errors say of objects in memory differs from run to run, and details are written down.
ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")


class SampleReject(Exception):
    """A fault of the data, not of the code: the sample becomes a counted row with `reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = ADDRESS.sub("", detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What `resize_and_crop` did, in pixels: the size after resizing and the corner of the crop within it."""

    resized_width: int
    resized_height: int
    x: int
    y: int
    scale: float


def shrink(image: Image.Image, *, short_side_pixels: int) -> Image.Image:
    """Return a larger image with this short side, and others as they are; 0 shrinks none."""
    wanted, short = short_side_pixels, min(image.size)
    if not 0 < wanted < short:
        return image
    # As the processor of LLaVA-1.5 would do it at the other end: the long side is rounded down.
    size = (wanted * image.width // short, wanted * image.height // short)
    return image.resize(size, Image.Resampling.BICUBIC)


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode `data` to an 8-bit RGB image as a browser shows it on a white page; animations give their first frame.

    JPEG, PNG, WebP, GIF, AVIF, TIFF, BMP, JPEG 2000, PPM and, with `pillow-heif`, HEIC are decoded, whatever the member
    is called: palette, grey, CMYK, L*a*b* and samples of any depth, brought to sRGB by their ICC profile, transparency
    laid over white, turned as their EXIF orientation says. The declared size is looked at before a pixel is decoded,
    and metadata cost no picture, nor do last bytes with which no more than `MAX_MISSING` of the pixels is missing.

    Raises:
        SampleReject: `empty_image`, `not_an_image`, `unsupported_image` (JPEG XL, HEIC without that package, or colours
            that cannot be converted), `too_many_pixels`, `too_small` or `corrupt_image`.
    """
    picture = _open_image(data, max_pixels=max_pixels)
    image = _pixels(picture, data)
    try:
        return picture.show(image)
    except Exception as error:
        if is_out_of_memory(error):  # of a picture that has been decoded
            raise
        if isinstance(error, ValueError | OSError):
            raise SampleReject("unsupported_image", f"mode {image.mode}: {error}") from None
        # What damaged data have led to is met here first, as a palette that is not there.
        raise SampleReject("corrupt_image", f"mode {image.mode}: {error!r}") from error


def _pixels(picture: Picture, data: bytes) -> Image.Image:
    """Decode, also what only lacks its last bytes, and with them next to no pixel."""
    num_bytes = BYTES_PER_PIXEL * picture.width * picture.height
    try:
        image = picture.pixels()
        missing = share_never_there(data, image)
    except Exception as error:
        _require_memory(error, num_bytes)
        try:
            decoded = decode_cut(data)
        except Exception as other:
            _require_memory(other, num_bytes)
            raise SampleReject("corrupt_image", str(error)) from other
        if decoded is None:
            raise SampleReject("corrupt_image", str(error)) from error
        image, missing = decoded
        if missing > MAX_MISSING:
            raise SampleReject("corrupt_image", f"{error}; {missing:.0%} of the picture is missing") from error
        return image
    if missing > MAX_MISSING:
        raise SampleReject("corrupt_image", f"a JPEG that was cut and closed; {missing:.0%} of the picture is missing")
    return image


def image_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Return width and height of what `decode_image` would give, without decoding a pixel.

    `data` may be the start of a file, as long as it holds what stands in front of the pixels.

    Raises:
        SampleReject: as `decode_image`, but for damage among the pixels.
    """
    return _open_image(data, max_pixels=max_pixels).shown_size


def _open_image(data: bytes, *, max_pixels: int) -> Picture:
    if not data:
        raise SampleReject("empty_image")
    try:
        picture = open_picture(data)
    except UnsupportedPictureError as error:
        raise SampleReject("unsupported_image", str(error)) from None
    except UnidentifiedImageError as error:
        raise SampleReject("not_an_image", str(error)) from None
    except Exception as error:  # whatever the bytes lead a decoder into
        _require_memory(error, BYTES_PER_PIXEL * len(data))
        raise SampleReject("corrupt_image", str(error)) from error
    if picture.width * picture.height > max_pixels:
        raise SampleReject("too_many_pixels", f"{picture.width} x {picture.height} > {max_pixels}")
    if min(picture.width, picture.height) < MIN_SIDE_PIXELS:
        raise SampleReject("too_small", f"{picture.width} x {picture.height}")
    return picture


def _require_memory(error: Exception, num_bytes: int) -> None:
    """Tell a machine without memory from damaged data that asks a decoder for absurd amounts of it.

    Raises:
        MemoryError: what a sound image takes is not there either: the image is not at fault, and is not rejected.
    """
    if is_out_of_memory(error):
        bytearray(num_bytes)


def resize_and_crop(
    image: Image.Image, width_pixels: int, height_pixels: int, *, max_pixels: int
) -> tuple[Image.Image, Crop]:
    """Scale `image` until it covers the target, then cut the centre; gives the image and what was done.

    Raises:
        SampleReject: `too_elongated`, see `plan_crop`.
    """
    crop = plan_crop(image.width, image.height, width_pixels, height_pixels, max_pixels=max_pixels)
    return crop_as(image, crop, width_pixels, height_pixels), crop


def crop_as(image: Image.Image, crop: Crop, width_pixels: int, height_pixels: int) -> Image.Image:
    """Resize `image`, of whatever size, and cut it to the target as another one was."""
    size = (crop.resized_width, crop.resized_height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image.crop((crop.x, crop.y, crop.x + width_pixels, crop.y + height_pixels))


def plan_crop(from_width: int, from_height: int, width_pixels: int, height_pixels: int, *, max_pixels: int) -> Crop:
    """Return what `resize_and_crop` does to an image of a size, in pixels.

    Raises:
        SampleReject: `too_elongated`: a line, which has more than `max_pixels` once its short side covers the target.
    """
    scale = max(width_pixels / from_width, height_pixels / from_height)
    resized_width = max(width_pixels, round(from_width * scale))
    resized_height = max(height_pixels, round(from_height * scale))
    if resized_width * resized_height > max(max_pixels, ALWAYS_RESIZED * width_pixels * height_pixels):
        raise SampleReject("too_elongated", f"{from_width} x {from_height} becomes {resized_width} x {resized_height}")
    x, y = (resized_width - width_pixels) // 2, (resized_height - height_pixels) // 2
    return Crop(resized_width=resized_width, resized_height=resized_height, x=x, y=y, scale=scale)


def require_large_enough(crop: Crop, max_upscale: float | None) -> None:
    """Refuse an image that is scaled up by more than `max_upscale` to cover its bucket.

    Raises:
        SampleReject: `smaller_than_bucket`.
    """
    if max_upscale is not None and crop.scale > max_upscale:
        raise SampleReject("smaller_than_bucket", f"it would be scaled up by {crop.scale:.2f}, more than {max_upscale}")


@functools.cache
def aspect_buckets(base_resolution: int, *, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return the distinct (height, width) buckets, in pixels, by rising height / width from 0.25 to 4.

    At 256, 512 and 1024 these are the paper's 40 buckets (A.5, "mirroring the method used in SDXL": SDXL's table,
    appendix I). At other resolutions the same table is scaled and rounded to `multiple` (the codec's factor
    times the patch size, 16 for the paper's VAE), where several of the 40 may fall together.

    Raises:
        UserError: `base_resolution` is not a positive multiple of `multiple`.
    """
    if base_resolution <= 0 or base_resolution % multiple:
        raise UserError(f"resolution {base_resolution} is not a positive multiple of {multiple}")
    unit_pixels = base_resolution / 16

    def side(units: int) -> int:
        return max(multiple, round(units * unit_pixels / multiple) * multiple)

    buckets = {(side(height), side(width)) for height, width in SDXL_BUCKETS}
    return tuple(sorted(buckets, key=lambda size: (size[0] / size[1], size)))


def nearest_bucket(width_pixels: int, height_pixels: int, base_resolution: int, *, multiple: int) -> tuple[int, int]:
    """Return the (height, width) bucket whose aspect ratio is nearest to the image's, on a logarithmic scale."""
    target = np.log(height_pixels / width_pixels)
    buckets = aspect_buckets(base_resolution, multiple=multiple)
    return min(buckets, key=lambda size: (abs(np.log(size[0] / size[1]) - target), size))
