"""Images decoded, resized and cropped to their bucket, with the geometry that goes into an index row."""

# H W pixels

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.raw.images import Crop, decode_image, nearest_bucket, plan_crop, require_large_enough, resize_and_crop


@dataclass(frozen=True, kw_only=True)
class CutImage:
    """An image cropped to its bucket.

    Attributes:
        pixels: uint8 [H, W, 3].
        original: width and height before it was resized and cropped as `crop` says.
        beside: content of the file that its sample has beside it, if such are read.
    """

    pixels: np.ndarray
    original: tuple[int, int]
    crop: Crop
    beside: bytes


@dataclass(frozen=True, kw_only=True)
class Cropping:
    """How images are cut.

    Attributes:
        resolution: side of the square in pixels, or of that whose area a bucket has.
        multiple: that sides of buckets are of; None where all are the square.
        max_upscale: see `features.max_upscale`.
        max_pixels: of an image.
    """

    resolution: int
    multiple: int | None
    max_upscale: float | None
    max_pixels: int

    def cut(self, data: bytes, *, beside: bytes = b"") -> CutImage:
        """Return the crop of an encoded image; raises `SampleReject` where there is none."""
        image = decode_image(data, max_pixels=self.max_pixels)
        height, width = self.resolution, self.resolution
        if self.multiple is not None:
            height, width = nearest_bucket(image.width, image.height, self.resolution, multiple=self.multiple)
        crop = plan_crop(image.width, image.height, width, height, max_pixels=self.max_pixels)
        require_large_enough(crop, self.max_upscale)
        cropped, crop = resize_and_crop(image, width, height, max_pixels=self.max_pixels)
        return CutImage(pixels=np.array(cropped), original=image.size, crop=crop, beside=beside)


def geometry(cut: CutImage) -> dict[str, Any]:
    """Return what an index row says of a crop: its bucket, and how it came about."""
    height, width, _ = cut.pixels.shape
    return {
        "bucket": f"{height}x{width}",
        "original_width": cut.original[0],
        "original_height": cut.original[1],
        "resized_width": cut.crop.resized_width,
        "resized_height": cut.crop.resized_height,
        "crop_x": cut.crop.x,
        "crop_y": cut.crop.y,
    }
