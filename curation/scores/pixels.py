"""The score `pixels`: what an image is as a file and as pixels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from curation.scores.protocol import Column, ImageScore, LoadedImage
from pipelines.raw.pictures.open_picture import HEIF_BRANDS, TIFF

SIZES = (
    Column(name="width", type=pa.int32(), unit="pixels", meaning="Width as shown, after the EXIF turn"),
    Column(name="height", type=pa.int32(), unit="pixels", meaning="Height as shown"),
    Column(name="min_side", type=pa.int32(), unit="pixels", meaning="The shorter of both"),
    Column(name="max_side", type=pa.int32(), unit="pixels", meaning="The longer of both"),
    Column(name="aspect", type=pa.float32(), unit="", meaning="Width / height"),
    Column(name="megapixels", type=pa.float32(), unit="10^6 pixels", meaning="Width x height"),
    Column(name="file_bytes", type=pa.int64(), unit="bytes", meaning="Size of the image's file"),
    Column(name="format", type=pa.string(), unit="", meaning="jpeg, png, webp, gif, avif, heif, tiff, bmp, jp2, ppm"),
)
MEASURES = (
    Column(
        name="sharpness",
        type=pa.float32(),
        unit="levels^2",
        meaning="Variance of the luminance's Laplacian, longer side 512 at most; under about 100 is soft",
    ),
    Column(name="entropy", type=pa.float32(), unit="bits", meaning="Of the histogram of luminance; 0 is one tone"),
    Column(name="brightness", type=pa.float32(), unit="0 to 1", meaning="Mean of luminance"),
    Column(name="contrast", type=pa.float32(), unit="0 to 1", meaning="Standard deviation of luminance"),
    Column(
        name="colourfulness",
        type=pa.float32(),
        unit="",
        meaning="Hasler and Süsstrunk's; 0 is grey, above 80 very much",
    ),
    Column(
        name="border_fraction", type=pa.float32(), unit="0 to 1", meaning="Share of the image in bars of one colour"
    ),
    Column(
        name="letterbox",
        type=pa.bool_(),
        unit="",
        meaning="Bars of one colour above and below alone, or left and right",
    ),
)
# How files begin.
STARTS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"\xff\x4f\xff\x51": "jp2",
    b"\x00\x00\x00\x0cjP": "jp2",
    **dict.fromkeys(TIFF, "tiff"),
    **{b"P%d" % kind: "ppm" for kind in range(1, 7)},
}


class Pixels(ImageScore):
    """Sizes of the file and of the image as it is shown, and what its pixels tell; see `pixel_measures`."""

    name = "pixels"
    version: ClassVar[int] = 2
    columns = (*SIZES, *MEASURES)

    def look(self, loaded: LoadedImage) -> Mapping[str, Any]:
        """Return the row of an image."""
        # Of no use to a plan or to help, and it takes its time to load.
        from curation.scores.pixel_measures import measure_pixels

        width, height = loaded.image.size
        return {
            "width": width,
            "height": height,
            "min_side": min(width, height),
            "max_side": max(width, height),
            "aspect": width / height,
            "megapixels": width * height / 1e6,
            "file_bytes": len(loaded.data),
            "format": file_format(loaded.data),
            **measure_pixels(loaded.pixels, loaded.small),
        }

    def measure(self, looks: Sequence[Any]) -> Mapping[str, Any]:
        """Return the rows' columns."""
        return {each.name: [look[each.name] for look in looks] for each in self.columns}


def file_format(data: bytes) -> str:
    """Return the format of an image's bytes, whatever the file is called; `other` of what is not known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "heif" if data[8:12] in HEIF_BRANDS else "avif"
    return next((name for start, name in STARTS.items() if data.startswith(start)), "other")
